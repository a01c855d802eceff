"""Replay of a request trace against a policy, under the cost model of a machine.

A discrete-event simulation: what the planner of `scheduler.planning` would decide and what each step would
cost, without tokens and without a device. The policies are the very objects of the real scheduler.
"""
