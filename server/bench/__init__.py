"""Load on any OpenAI-compatible server, and what it felt like to the clients.

Definitions (seconds inside, milliseconds in tables), those of vLLM's `bench serve` where it has them:
- TTFT: from sending the request to the first chunk that carries output.
- ITL: the gaps between one output chunk and the next, of all requests together. A chunk that carries
  several tokens is one gap, so read it beside output tokens/s.
- completion: from sending the request to its last output chunk or finish reason.
- tokens: the server's own `usage`; where it sends none, output chunks are counted instead.
"""
