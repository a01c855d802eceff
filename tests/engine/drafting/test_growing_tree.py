"""Trees that grow: parents before children, siblings that differ, the best of all that was found."""

from __future__ import annotations

import random

from engine.drafting.growing_tree import MAX_COMPUTED, GrowingTree
from engine.drafting.guess import ROOT
from engine.drafting.standing import Standing


def grown(rng: random.Random, limit: int, passes: int = 30) -> GrowingTree:
    tree = GrowingTree(limit, Standing(), drawn=False)
    parents = [ROOT]
    for _ in range(passes):
        for parent in parents:
            chances = sorted((rng.random() ** 2 for _ in range(3)), reverse=True)
            tree.grow(parent, rng.sample(range(50), 3), chances)
        parents = tree.front()[: rng.randrange(1, 4)]
        words = tree.compute(parents)
        assert all(0 < word < 2**64 for word in words)
        if not parents:
            break
    return tree


def test_a_guess_is_the_best_of_what_was_found_and_a_tree():
    rng = random.Random(1)
    for _ in range(100):
        limit = rng.randrange(1, 20)
        tree = grown(rng, limit)
        guess = tree.guess()
        assert len(guess.tokens) == min(limit, len(tree.nodes))
        assert all(ROOT <= parent < k for k, parent in enumerate(guess.parents))
        assert len(set(zip(guess.parents, guess.tokens, strict=True))) == len(guess.tokens)
        scores = sorted((node.score for node in tree.nodes), reverse=True)
        assert tree.expected == 1 + sum(scores[:limit])
        assert len(tree.computed) <= MAX_COMPUTED, "there is room for so many"


def test_words_name_ancestors_among_the_computed():
    rng = random.Random(2)
    tree = GrowingTree(60, Standing(), drawn=False)
    tree.grow(ROOT, [1, 2, 3], [0.5, 0.4, 0.3])
    words: dict[int, int] = {}
    for _ in range(5):
        nodes = rng.sample(tree.front(), min(3, len(tree.front())))
        words |= dict(zip(nodes, tree.compute(nodes), strict=True))
        for node in nodes:
            tree.grow(node, [4, 5], [0.9, 0.8])
    for node, word in words.items():
        seen = {tree.computed[slot] for slot in range(len(tree.computed)) if word >> slot & 1}
        above = {node}
        while tree.nodes[node].parent != ROOT:
            node = tree.nodes[node].parent
            above.add(node)
        assert seen == above
    assert not tree.is_line


def test_a_line_is_known_as_one():
    tree = GrowingTree(9, Standing(), drawn=False)
    assert tree.is_line
    tree.grow(ROOT, [1, 2], [0.9, 0.1])
    for _ in range(3):
        node = tree.front()[0]
        tree.compute([node])
        tree.grow(node, [1, 2], [0.9, 0.1])
        assert tree.is_line
    assert tree.path(tree.computed[-1]) == (1, 1, 1)
    tree.compute([1])
    assert not tree.is_line


def test_the_path_that_the_text_took_is_found_by_slots():
    tree = GrowingTree(9, Standing(), drawn=False)
    tree.grow(ROOT, [1, 2], [0.9, 0.8])
    tree.compute([0, 1])  # slots 0, 1
    tree.grow(1, [3, 4], [0.9, 0.8])
    tree.compute([3])  # token 4, slot 2
    tree.grow(3, [5], [0.9])
    assert tree.slots(tree.followed([2, 4, 5, 6])) == (1, 2), "5 was never computed"
    assert tree.slots(tree.followed([2, 9])) == (1,)
    assert tree.followed([9]) == ()


def test_what_grew_behind_a_node_is_a_tree_of_its_own():
    rng = random.Random(3)
    for _ in range(50):
        tree = grown(rng, 40, passes=8)
        top = rng.choice([ROOT, *tree.computed])
        above = tree.path(top) if top != ROOT else ()
        rest, slots = tree.below(top, 12)
        assert len(slots) == len(rest.computed)
        for slot, node in zip(slots, rest.computed, strict=True):
            assert tree.path(tree.computed[slot]) == (*above, *rest.path(node))
        paths = {rest.path(node) for node in range(len(rest.nodes))}
        whole = {tree.path(node) for node in range(len(tree.nodes))}
        assert {(*above, *path) for path in paths} == {
            path for path in whole if path[: len(above)] == above and path != above
        }
        share = tree.nodes[top].score if top != ROOT else 1.0
        for node in range(len(rest.nodes)):
            found = tree.nodes[
                next(k for k in range(len(tree.nodes)) if tree.path(k) == above + rest.path(node))
            ]
            assert abs(rest.nodes[node].score * share - found.score) < 1e-9
            assert rest.nodes[node].depth == len(rest.path(node)) - 1
        assert len(rest.guess().tokens) == min(12, len(rest.nodes))
        assert list(slots) == sorted(slots)
        assert all(node not in rest.computed for node in rest.front())


def test_experience_replaces_belief():
    standing = Standing()
    assert standing.chance(3, 0.3) == 0.3
    for _ in range(50):
        standing.note(3, True)
    assert standing.chance(3, 0.3) > 0.9
    assert standing.chance(4, 0.3) == 0.3, "of another kind"
    for _ in range(4000):
        standing.note(3, False)
    assert standing.chance(3, 0.3) < 0.05, "the latest count most"


def test_drawn_drafts_and_ranks_are_told_apart_and_no_chance_stays_none():
    standing = Standing()
    for _ in range(50):
        tree = GrowingTree(4, standing, drawn=True)
        tree.grow(ROOT, [7], [0.3])
        tree.followed([7])
    drawn, greedy = GrowingTree(4, standing, drawn=True), GrowingTree(4, standing, drawn=False)
    for tree in (drawn, greedy):
        tree.grow(ROOT, [7, 8, 9], [0.3, 0.3, 0.0])
    assert drawn.nodes[0].score > 0.9
    assert [node.score for node in (drawn.nodes[1], *greedy.nodes)] == [0.3] * 3
