"""The requests of simulated clients through the filter's model: the threads that nbdkit gives to filter.c.

Each function is one of filter.c's callbacks. `answered`: the request was done here. `through`: it is the data path's,
which calls `member.claim` first, and when it has its answer, `leave`. Nothing here calls the engine.
"""

from collections.abc import Callable

from tests.sim.filter_model import Kind, Op
from tests.sim.member import Member
from tests.sim.world import World


def _settled(world: World, member: Member, op: Op, ok: bool) -> bool:
    assert member.filter is not None
    if member.filter.settle(op, ok):
        world.coverage[f"{op.kind.value} done by the filter"] += 1
        return True
    if ok:
        world.coverage["filter op taken"] += 1
    else:
        world.coverage["filter op handed over after a failure"] += 1
    world.note(f"filter {member.opener} hands over the {op.kind.value} of [{op.start},{op.end}) ok {ok}")
    return False


def read(
    world: World,
    member: Member,
    start: int,
    end: int,
    answered: Callable[[dict[int, int]], None],
    through: Callable[[Op | None, dict[int, int]], None],
) -> None:
    """`through` with None: nothing was begun here, no claim and no `leave`. Else with what was read, if it was."""
    model = member.filter
    assert model is not None

    def begin() -> None:
        op = model.begin_read(start, end)
        if op is None:
            world.soon(member, lambda: through(None, {}))
            return
        world.note(f"filter {member.opener} reads [{start},{end}) of leg {op.legs - 1}")
        world.leg_read(member, op.legs - 1, range(start, end), lambda got: model.arrive(lambda: end_it(op, got)))

    def end_it(op: Op, got: dict[int, int] | None) -> None:
        if _settled(world, member, op, got is not None):
            assert got is not None
            answered(got)
        else:
            world.soon(member, lambda: through(op, got or {}))

    model.arrive(begin)


def write(
    world: World,
    member: Member,
    start: int,
    end: int,
    values: dict[int, int],
    answered: Callable[[], None],
    through: Callable[[Op], None],
) -> None:
    """Leg after leg; a failure is not interpreted: the data path does all of it again."""
    model = member.filter
    assert model is not None

    def begin() -> None:
        op = model.begin_write(start, end)
        if op is None:
            model.wait(begin)
        elif op.kind is Kind.LET_THROUGH:
            world.soon(member, lambda: through(op))
        else:
            world.note(f"filter {member.opener} writes [{start},{end}) = {values[start]}.. legs {op.legs}")
            write_legs(op, [leg for leg in op.order if op.legs & (1 << leg)])

    def write_legs(op: Op, left: list[int]) -> None:
        def landed(ok: bool) -> None:
            if ok and left[1:]:
                write_legs(op, left[1:])
            else:
                model.arrive(lambda: end_it(op, ok))

        world.leg_write(member, left[0], values, landed)

    def end_it(op: Op, ok: bool) -> None:
        if _settled(world, member, op, ok):
            answered()
        else:
            world.soon(member, lambda: through(op))

    model.arrive(begin)
