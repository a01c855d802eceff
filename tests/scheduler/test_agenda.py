from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from scheduler.agenda import Agenda

_OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["push", "discard", "pop"]), st.integers(0, 9), st.integers(0, 4))
)


@given(_OPERATIONS)
def test_it_behaves_as_a_sorted_list(operations: list[tuple[str, int, int]]) -> None:
    agenda: Agenda[str] = Agenda()
    model: dict[int, float] = {}
    for name, number, when in operations:
        if name == "push" and number not in model:
            agenda.push((float(when), number), str(number))
            model[number] = float(when)
        elif name == "discard":
            assert agenda.discard(number) == (model.pop(number, None) is not None)
        elif name == "pop" and model:
            number = min((when, number) for number, when in model.items())[1]
            assert agenda.discard(number)
            del model[number]
        first = agenda.first()
        expected = min(((when, number) for number, when in model.items()), default=None)
        assert (first and first[0]) == expected
        assert len(agenda) == len(model)


def test_what_was_taken_out_does_not_pile_up() -> None:
    agenda: Agenda[int] = Agenda()
    for number in range(10_000):
        agenda.push((0.0, number), number)
        agenda.discard(number)
    assert len(agenda._heap) <= 17
