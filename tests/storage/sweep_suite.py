"""The conformance suite of `SweepLog`: what every backend promises of sweeps, backend by backend in a few lines.

A backend supplies `open_store`: called with a name it opens a metadata store on the database of that name, empty at first.
Backends that several processes may open at once derive from `DurableSweepLogTests`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from metadata_suite import changed, record

from aq_data.errors import AqDataError, ConflictError, NotFoundError, UnavailableError, ValidationError
from aq_data.models import sweep as sweeps
from aq_data.models.arrays import ArrayInfo
from aq_data.models.sweep import Block, Ending, Piece, Placed, Plan, Region, Seal, State, place
from aq_data.storage.metadata.record import Record
from aq_data.storage.metadata.store import MetadataStore
from aq_data.storage.metadata.sweeplog import Incoming, Row, Tail

T = TypeVar("T")
OpenStore = Callable[[str], MetadataStore]

NOW, LATER = "2026-01-31T08:00:00.000000Z", "2026-01-31T09:00:00.000000Z"
ABSENT = "0197f000-0000-7000-8000-000000000000"
ARRAYS = (
    ArrayInfo("y", "<f8", (0,), ("x",), (4,), 0, is_partial=True),
    ArrayInfo("t", "string", (0,), ("x",), (4,), 0, is_partial=True),
    ArrayInfo("k", "|u1", (3,), ("k",), (3,), 3, is_partial=True),
)


def within(open_store: OpenStore, body: Callable[..., Awaitable[T]], stores: int = 1, name: str = "one") -> T:
    """What `body` returns for so many stores on one database, closed afterwards."""

    async def run() -> T:
        opened = [open_store(name) for _ in range(stores)]
        try:
            return await body(*opened)
        finally:
            for store in opened:
                await store.close()

    return asyncio.run(run())


def new_sweep(**plan: Any) -> tuple[Record, Plan, State]:
    one = record(state="open")
    plan = Plan(**{"id": one.document.id, "attempt": one.attempt, "arrays": ARRAYS, "growing": ("x",), **plan})
    return one, plan, State(extents={"x": 0})


async def opened(store: MetadataStore, **plan: Any) -> Plan:
    """A new sweep without blocks."""
    one, made, state = new_sweep(**plan)
    assert await store.sweeps.open(one, made, state, []) is None
    return made


def step(writer: str, n: int, count: int = 1, length: int = 1) -> Incoming:
    """An appended block; its payload says whose it is."""
    payload = f"{writer}{n:07}".encode()[:8] * length
    return Incoming(Block(writer, n, (Piece("y", (length,), "<f8", append="x"),), count), payload)


def steps(writer: str, first: int, last: int) -> list[Incoming]:
    return [step(writer, n) for n in range(first, last + 1)]


async def append(store: MetadataStore, plan: Plan, *blocks: Incoming) -> State:
    """All of them are stored; the state after it."""
    appended = await store.sweeps.append(plan.id, blocks, NOW)
    assert (appended.stored, appended.refused) == (len(blocks), None)
    return appended.state


async def seqs(store: MetadataStore, plan: Plan, after: int = 0) -> list[int]:
    return [row.placed.seq for row in (await store.sweeps.tail(plan.id, after)).rows]


async def folded(store: MetadataStore, plan: Plan, through: int) -> State:
    """As a folder does it: lease, record, let go."""
    state = await store.sweeps.lease(plan.id, 1.0, 2.0)
    assert state is not None
    assert await store.sweeps.record_fold(plan.id, state.token, through, f"{through}-{state.token}", 5.0)
    assert await store.sweeps.renew(plan.id, state.token, 0.0)
    return (await store.sweeps.get(plan.id))[1]


async def everything(store: MetadataStore, plan: Plan) -> tuple[Any, ...]:
    """All that the log says of a sweep, to be compared before and after."""
    tail = await store.sweeps.tail(plan.id)
    return (await store.sweeps.get(plan.id), tail, await store.sweeps.headers(plan.id, 0, 1000))


class SweepLogTests:
    """What a sweep log promises."""

    # --- opening ---------------------------------------------------------------------------------------------------

    def test_an_opened_sweep_is_a_record_and_an_empty_log(self, open_store):
        """Both at once, and nothing is to be done for it."""

        async def body(store):
            one, plan, state = new_sweep(notify=("http://x",))
            assert await store.sweeps.open(one, plan, state, []) is None
            assert await store.get(plan.id) == one
            assert await store.sweeps.get(plan.id) == (plan, state)
            assert await store.sweeps.tail(plan.id) == Tail(plan, state, ())
            assert await store.sweeps.headers(plan.id, 0, 10) == (state, [])
            assert await store.sweeps.unfinished() == []

        within(open_store, body)

    def test_blocks_that_come_with_the_opening_are_in_the_log_at_once(self, open_store):
        """Placed by the caller; they wait to be folded."""

        async def body(store):
            one, plan, state = new_sweep()
            state, placed = place(plan, state, Block("open", 1, (Piece("k", (3,), "|u1"),)), NOW)
            row = Row(placed, b"abc", "")
            assert await store.sweeps.open(one, plan, state, [row]) is None
            assert await store.sweeps.tail(plan.id) == Tail(plan, state, (row,))
            assert await store.sweeps.unfinished() == [(plan, state)]
            assert (await append(store, plan, step("w", 1))).head == 2

        within(open_store, body)

    def test_of_two_openings_under_one_id_the_first_stands(self, open_store):
        """The second learns what is there and changes nothing, neither record nor log."""

        async def body(store):
            one, plan, state = new_sweep()
            assert await store.sweeps.open(one, plan, state, []) is None
            await append(store, plan, step("w", 1))
            before = await everything(store, plan)
            other = msgspec.structs.replace(one, attempt="other", digest="other")
            other_plan = msgspec.structs.replace(plan, attempt="other", growing=())
            assert await store.sweeps.open(other, other_plan, state, []) == one
            assert await everything(store, plan) == before
            assert await store.insert(other) == one
            saved = record()
            assert await store.insert(saved) is None
            taken = msgspec.structs.replace(plan, id=saved.document.id)
            assert await store.sweeps.open(saved, taken, state, []) == saved
            with pytest.raises(NotFoundError):
                await store.sweeps.get(saved.document.id)

        within(open_store, body)

    def test_of_many_openings_at_once_exactly_one_is_new(self, open_store):
        """The others are all told of the same one."""

        async def body(store):
            one, plan, state = new_sweep()
            attempts = [
                (msgspec.structs.replace(one, attempt=f"{i}"), msgspec.structs.replace(plan, attempt=f"{i}"))
                for i in range(8)
            ]
            answers = await asyncio.gather(*(store.sweeps.open(*attempt, state, []) for attempt in attempts))
            assert answers.count(None) == 1
            winner = attempts[answers.index(None)]
            assert {answer.attempt for answer in answers if answer is not None} == {winner[0].attempt}
            assert (await store.sweeps.get(plan.id))[0] == winner[1]

        within(open_store, body)

    def test_an_opening_whose_attempt_or_blob_was_barred_leaves_nothing(self, open_store):
        """Its bytes may be gone: it is to be sent again."""

        async def body(store):
            for barred in ("attempt", "ref"):
                one, plan, state = new_sweep()
                state, placed = place(plan, state, Block("open", 1, (Piece("k", (3,), "|u1"),)), NOW)
                await store.bar(plan.id, one.attempt if barred == "attempt" else "blob")
                with pytest.raises(UnavailableError):
                    await store.sweeps.open(one, plan, state, [Row(placed, b"", "blob")])
                assert await store.get(plan.id) is None
                with pytest.raises(NotFoundError):
                    await store.sweeps.get(plan.id)
                assert await store.sweeps.unfinished() == []

        within(open_store, body)

    # --- absence ---------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("why", ["never", "saved", "deleted", "forgotten"])
    def test_a_sweep_that_is_not_there_is_not_found_by_any_method(self, open_store, why):
        """None of that id, a DataFile that was saved, one that was deleted (told by its code), one that was forgotten."""

        async def body(store):
            one, plan, state = new_sweep()
            id = ABSENT
            if why != "never":
                id = plan.id
            if why == "saved":
                await store.insert(one)
            if why in ("deleted", "forgotten"):
                await store.sweeps.open(one, plan, state, [])
                await append(store, plan, step("w", 1))
                await store.sweeps.lease(id, 1.0, 2.0)
                assert await store.replace(changed(one, state="deleted"), 1)
            if why == "forgotten":
                await store.sweeps.forget(id)
                await store.sweeps.forget(id)
            for ask in (
                lambda: store.sweeps.get(id),
                lambda: store.sweeps.append(id, [step("w", 2)], NOW),
                lambda: store.sweeps.append(id, [], NOW),
                lambda: store.sweeps.seal(id, "complete", Ending(), NOW),
                lambda: store.sweeps.tail(id),
                lambda: store.sweeps.headers(id, 0, 10),
                lambda: store.sweeps.lease(id, 5.0, 6.0),
                lambda: store.sweeps.renew(id, 1, 6.0),
                lambda: store.sweeps.record_fold(id, 1, 1, "1-1", 5.0),
                lambda: store.sweeps.drop(id, 1),
                lambda: store.sweeps.end(id, 1, changed(one), 1),
                lambda: store.sweeps.tell(id, "http://x"),
            ):
                with pytest.raises(NotFoundError) as failure:
                    await ask()
                assert failure.value.code == ("deleted" if why == "deleted" else "not_found")
            assert await store.sweeps.unfinished() == []
            await store.sweeps.forget(ABSENT)

        within(open_store, body)

    def test_forgetting_one_sweep_leaves_the_others(self, open_store):
        """Also one opened after it, which must not find its blocks."""

        async def body(store):
            plans = [await opened(store) for _ in range(3)]
            for plan in plans:
                await append(store, plan, *steps("w", 1, 3))
            kept = [await everything(store, plan) for plan in (plans[0], plans[2])]
            await store.sweeps.forget(plans[1].id)
            later = await opened(store)
            assert await seqs(store, later) == []
            await append(store, later, step("w", 1))
            assert await seqs(store, later) == [1]
            assert [await everything(store, plan) for plan in (plans[0], plans[2])] == kept

        within(open_store, body)

    # --- appending -------------------------------------------------------------------------------------------------

    def test_blocks_come_back_in_order_with_all_that_came_with_them(self, open_store):
        """Header, payload bit for bit, ref; the state says the same as the rows."""

        async def body(store):
            plan = await opened(store)
            blocks = [
                step("w", 1, length=3),
                Incoming(Block("ü💥", 2, (Piece("t", (2,), "string", (4,), nbytes=5),), 2), bytes(range(5))),
                Incoming(Block("w", 2, (Piece("y", (1 << 20,), "<f8", append="x"),)), b"", "some-ref"),
                Incoming(Block("w", 3, (Piece("k", (0,), "|u1"),)), b""),
                Incoming(Block("w", 4, (Piece("y", (1,), "<f8"), Piece("k", (2,), "|u1", (1,)))), b"12345678ab"),
            ]
            state = await append(store, plan, *blocks)
            wanted = [
                Placed(1, "w", 1, NOW, (Region("y", (0,), (3,), 24),)),
                Placed(2, "ü💥", 2, NOW, (Region("t", (4,), (2,), 5),), 2),
                Placed(3, "w", 2, NOW, (Region("y", (6,), (1 << 20,), 8 << 20),)),
                Placed(4, "w", 3, NOW, (Region("k", (0,), (0,), 0),)),
                Placed(5, "w", 4, NOW, (Region("y", (0,), (1,), 8), Region("k", (1,), (2,), 2))),
            ]
            tail = await store.sweeps.tail(plan.id)
            assert tail.rows == tuple(Row(p, b.payload, b.ref) for p, b in zip(wanted, blocks, strict=True))
            assert tail.state == state == (await store.sweeps.get(plan.id))[1]
            assert state.writers == {"w": 4, "ü💥": 2}
            assert (state.head, state.folded, state.last_block_at) == (5, 0, NOW)
            assert state.extents == {"x": 6 + (1 << 20)}
            assert set(state.touched) == {"y", "t", "k"}
            assert state.unfolded_bytes == 24 + 5 + (8 << 20) + 0 + 10
            told, headers = await store.sweeps.headers(plan.id, 0, 100)
            assert told == state
            assert [(seq, msgspec.json.decode(header, type=Placed)) for seq, header in headers] == [
                (p.seq, p) for p in wanted
            ]

        within(open_store, body)

    def test_what_is_appended_to_an_empty_list_of_blocks_is_nothing(self, open_store):
        """The state is answered all the same."""

        async def body(store):
            plan = await opened(store)
            await append(store, plan, step("w", 1))
            before = await everything(store, plan)
            assert (await append(store, plan)).head == 1
            assert await everything(store, plan) == before

        within(open_store, body)

    REFUSALS = (
        (Block("w", 5, (Piece("y", (1,), "<f8", append="x"),)), ConflictError, "missing_blocks"),
        (Block("w", 3, (Piece("y", (1,), "<f4", append="x"),)), ValidationError, "unsupported_dtype"),
        (Block("w", 3, (Piece("q", (1,), "<f8", append="x"),)), ValidationError, None),
        (Block("w", 3, (Piece("k", (4,), "|u1"),)), ValidationError, None),
        (Block("w", 3, ()), ValidationError, None),
    )

    @pytest.mark.parametrize("refused", REFUSALS, ids=lambda r: str(r[0].variables)[:30])
    def test_blocks_before_a_refused_one_stay_and_those_behind_it_do_not_come(self, open_store, refused):
        """Repeats among them count as stored; the error says why it went no further."""
        header, error, code = refused

        async def body(store):
            plan = await opened(store)
            await append(store, plan, step("w", 1))
            appended = await store.sweeps.append(
                plan.id, [step("w", 1), step("w", 2), Incoming(header, b"x" * 8), step("v", 1)], LATER
            )
            assert appended.plan == plan
            assert appended.stored == 2
            assert type(appended.refused) is error
            assert code is None or appended.refused.code == code
            assert appended.state == (await store.sweeps.get(plan.id))[1]
            assert appended.state.writers == {"w": 2}
            assert [(r.placed.n, r.placed.at) for r in (await store.sweeps.tail(plan.id)).rows] == [(1, NOW), (2, LATER)]
            before = await everything(store, plan)
            appended = await store.sweeps.append(plan.id, [Incoming(header, b"x" * 8)], LATER)
            assert appended.stored == 0
            assert await everything(store, plan) == before

        within(open_store, body)

    def test_a_repeat_is_stored_once_also_when_the_first_was_folded_away(self, open_store):
        """Whoever lost the answer sends it again, with the same numbers."""

        async def body(store):
            plan = await opened(store)
            await append(store, plan, *steps("w", 1, 4))
            await append(store, plan, *steps("w", 1, 4))
            assert await seqs(store, plan) == [1, 2, 3, 4]
            await folded(store, plan, 4)
            await store.sweeps.drop(plan.id, 4)
            before = await everything(store, plan)
            await append(store, plan, *steps("w", 2, 3))
            assert await everything(store, plan) == before
            assert (await append(store, plan, *steps("w", 3, 5))).head == 5
            assert await seqs(store, plan) == [5]

        within(open_store, body)

    def test_a_barred_blob_stores_none_of_the_blocks_it_came_with(self, open_store):
        """gc bars a key before it deletes it: what names it afterwards is to be sent again. Other sweeps do not mind."""

        async def body(store):
            plan, other = await opened(store), await opened(store)
            await store.bar(plan.id, "gone")
            large = Block("w", 2, (Piece("y", (1,), "<f8", append="x"),))
            before = await everything(store, plan)
            with pytest.raises(UnavailableError):
                await store.sweeps.append(plan.id, [step("w", 1), Incoming(large, b"", "gone"), step("w", 3)], NOW)
            assert await everything(store, plan) == before
            await append(store, plan, step("w", 1), Incoming(large, b"", "there"))
            await append(store, plan, Incoming(large, b"", "gone"))  # a repeat needs no blob
            await append(store, other, step("w", 1), Incoming(large, b"", "gone"))

        within(open_store, body)

    def test_many_writers_at_once_lose_nothing_and_interleave_whole_blocks(self, open_store):
        """Positions are each given once, appended places follow one another without gap or overlap."""
        self.check_concurrent(open_store, 1)

    def check_concurrent(self, open_store: OpenStore, stores: int) -> None:
        writers, blocks = 6, 20
        seed = random.randrange(1 << 30)
        print(f"seed {seed}")
        lengths = random.Random(seed)
        batches = [
            (f"w{w}", [step(f"w{w}", n, length=lengths.choice([0, 1, 2, 5])) for n in range(1, blocks + 1)])
            for w in range(writers)
        ]

        async def send(store, plan, contents):
            for i in range(0, blocks, 2):
                await append(store, plan, *contents[i : i + 2])
                if i % 6 == 0:
                    await append(store, plan, *contents[max(0, i - 3) : i + 2])  # the answer was lost

        async def body(*opened_stores):
            plan = await opened(opened_stores[0])
            await asyncio.gather(
                *(send(opened_stores[i % stores], plan, contents) for i, (_, contents) in enumerate(batches))
            )
            for store in opened_stores:
                tail = await store.sweeps.tail(plan.id)
                assert [row.placed.seq for row in tail.rows] == list(range(1, writers * blocks + 1))
                assert tail.state.writers == {writer: blocks for writer, _ in batches}
                end = 0
                for row in tail.rows:
                    [region] = row.placed.variables
                    assert region.start == (end,)
                    assert row.payload == step(row.placed.writer, row.placed.n, length=region.shape[0]).payload
                    end += region.shape[0]
                assert tail.state.extents == {"x": end}
                for writer, contents in batches:
                    mine = [row for row in tail.rows if row.placed.writer == writer]
                    assert [row.placed.n for row in mine] == list(range(1, blocks + 1))
                    assert [row.payload for row in mine] == [block.payload for block in contents]

        within(open_store, body, stores)

    # --- reading ---------------------------------------------------------------------------------------------------

    def test_a_tail_begins_behind_what_is_known_and_what_is_folded(self, open_store):
        """Never with a block that is in chunks already, dropped or not."""

        async def body(store):
            plan = await opened(store)
            await append(store, plan, *steps("w", 1, 8))
            assert await seqs(store, plan, 5) == [6, 7, 8]
            assert await seqs(store, plan, 8) == []
            assert await seqs(store, plan, 99) == []
            await folded(store, plan, 3)
            for _ in range(2):
                assert await seqs(store, plan) == [4, 5, 6, 7, 8]
                assert await seqs(store, plan, 2) == [4, 5, 6, 7, 8]
                assert await seqs(store, plan, 6) == [7, 8]
                state, headers = await store.sweeps.headers(plan.id, 1, 3)
                assert ([seq for seq, _ in headers], state.folded) == ([4, 5, 6], 3)
                assert (await store.sweeps.headers(plan.id, 8, 3))[1] == []
                await store.sweeps.drop(plan.id, 3)

        within(open_store, body)

    def test_a_tail_with_a_limit_has_the_first_blocks_and_at_least_one(self, open_store):
        """So a fold takes bounded memory and always gets on."""

        async def body(store):
            plan = await opened(store)
            await append(store, plan, *[step("w", n, length=length) for n, length in enumerate((5, 1, 1, 0, 9), 1)])
            for limit, count in ((0, 1), (39, 1), (40, 1), (47, 1), (48, 2), (56, 4), (127, 4), (128, 5), (9999, 5)):
                tail = await store.sweeps.tail(plan.id, 0, limit)
                assert [row.placed.seq for row in tail.rows] == list(range(1, count + 1)), limit
                assert tail.state.head == 5
            assert len((await store.sweeps.tail(plan.id, 4, 1)).rows) == 1

        within(open_store, body)

    def test_a_reader_beside_writers_and_a_folder_sees_one_moment(self, open_store):
        """State and rows agree, nothing is missing between them, and it never goes back in time."""
        self.check_moments(open_store, 1)

    def check_moments(self, open_store: OpenStore, stores: int) -> None:
        count = 60

        async def body(*opened_stores):
            plan = await opened(opened_stores[0])
            writing = True

            async def write():
                nonlocal writing
                for n in range(1, count + 1):
                    await append(opened_stores[-1], plan, step("w", n))
                writing = False

            async def fold():
                while writing:
                    state = (await opened_stores[0].sweeps.get(plan.id))[1]
                    if state.head > state.folded:
                        await folded(opened_stores[0], plan, state.head)
                        await opened_stores[0].sweeps.drop(plan.id, state.head)
                    await asyncio.sleep(0)

            async def read(store):
                head = folded_ = looks = 0
                while writing or not looks:
                    tail = await store.sweeps.tail(plan.id)
                    assert [row.placed.seq for row in tail.rows] == list(range(tail.state.folded + 1, tail.state.head + 1))
                    assert tail.state.extents["x"] == tail.state.head == tail.state.writers.get("w", 0)
                    assert (head, folded_) <= (tail.state.head, tail.state.folded)
                    head, folded_ = tail.state.head, tail.state.folded
                    state, headers = await store.sweeps.headers(plan.id, 0, 1000)
                    assert [seq for seq, _ in headers] == list(range(state.folded + 1, state.head + 1))
                    assert state.head >= head
                    looks += 1

            await asyncio.gather(write(), fold(), *(read(store) for store in opened_stores))

        within(open_store, body, stores)

    # --- sealing ---------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize(("outcome", "other"), [("complete", "abandoned"), ("abandoned", "complete")])
    def test_the_first_seal_wins_and_nothing_comes_after_it(self, open_store, outcome, other):
        """The same again is answered alike; the other is refused; a block is refused, a repeat of one is not."""

        async def body(store):
            plan = await opened(store)
            await append(store, plan, *steps("w", 1, 2))
            with pytest.raises(ConflictError) as failure:
                await store.sweeps.seal(plan.id, outcome, Ending({"w": 3}), NOW)
            assert failure.value.code == "missing_blocks"
            assert (await store.sweeps.get(plan.id))[1].seal is None
            state = await store.sweeps.seal(plan.id, outcome, Ending({"w": 2}, "why"), NOW)
            assert state.seal == Seal(outcome, "why", NOW)
            before = await everything(store, plan)
            assert before[0][1] == state
            assert await store.sweeps.seal(plan.id, outcome, Ending({"w": 2}, "again"), LATER) == state
            with pytest.raises(ConflictError) as failure:
                await store.sweeps.seal(plan.id, other, Ending(), LATER)
            assert failure.value.code == "illegal_state"
            appended = await store.sweeps.append(plan.id, [step("w", 2), step("w", 3)], LATER)
            assert (appended.stored, appended.refused.code) == (1, "finished")
            assert await everything(store, plan) == before

        within(open_store, body)

    def test_appends_and_seals_at_once_have_one_order(self, open_store):
        """What was acknowledged lies before the seal; exactly one of two ends wins."""
        self.check_sealing(open_store, 1)

    def check_sealing(self, open_store: OpenStore, stores: int) -> None:
        async def body(*opened_stores):
            for _ in range(4):
                plan = await opened(opened_stores[0])
                acknowledged = {}

                async def write(store, writer, plan=plan, acknowledged=acknowledged):
                    for n in range(1, 12):
                        appended = await store.sweeps.append(plan.id, [step(writer, n)], NOW)
                        if appended.refused is not None:
                            assert appended.refused.code == "finished"
                            return
                        acknowledged[writer] = n

                async def end(store, outcome, plan=plan):
                    await asyncio.sleep(0.003)
                    try:
                        return (await store.sweeps.seal(plan.id, outcome, Ending(), NOW)).seal.outcome
                    except ConflictError as exc:
                        return exc.code

                found = await asyncio.gather(
                    *(write(opened_stores[i % stores], f"w{i}") for i in range(3)),
                    *(end(opened_stores[i % stores], o) for i, o in enumerate(("complete", "abandoned", "complete"))),
                )
                state = (await opened_stores[-1].sweeps.get(plan.id))[1]
                assert state.seal is not None
                ends = found[3:]
                assert ends[1] == ("abandoned" if state.seal.outcome == "abandoned" else "illegal_state")
                assert {ends[0], ends[2]} == {"complete" if state.seal.outcome == "complete" else "illegal_state"}
                assert state.writers == acknowledged
                assert len(await seqs(opened_stores[0], plan)) == sum(acknowledged.values()) == state.head

        within(open_store, body, stores)

    # --- leases and folds ------------------------------------------------------------------------------------------

    def test_a_lease_is_one_folders_until_its_instant_and_each_has_a_token_of_its_own(self, open_store):
        """Renewed it lasts longer, let go of it ends, and an old token is nobody's."""

        async def body(store):
            plan = await opened(store)
            first = await store.sweeps.lease(plan.id, 100.0, 105.0)
            assert (first.token, first.leased_until) == (1, 105.0)
            assert await store.sweeps.lease(plan.id, 104.9, 110.0) is None
            assert (await store.sweeps.get(plan.id))[1] == first
            assert await store.sweeps.renew(plan.id, 1, 120.0) is True
            assert await store.sweeps.lease(plan.id, 110.0, 115.0) is None
            second = await store.sweeps.lease(plan.id, 120.0, 125.0)
            assert second.token == 2
            for token in (0, 1, 3):
                assert await store.sweeps.renew(plan.id, token, 999.0) is False
            assert (await store.sweeps.get(plan.id))[1].leased_until == 125.0
            assert await store.sweeps.renew(plan.id, 2, 0.0) is True
            assert (await store.sweeps.lease(plan.id, 121.0, 130.0)).token == 3

        within(open_store, body)

    def test_of_many_who_want_the_lease_at_once_one_has_it(self, open_store):
        """The others go home."""
        self.check_leases(open_store, 1)

    def check_leases(self, open_store: OpenStore, stores: int) -> None:
        async def body(*opened_stores):
            plan = await opened(opened_stores[0])
            for turn in range(1, 6):
                now = 100.0 * turn
                taken = await asyncio.gather(
                    *(opened_stores[i % stores].sweeps.lease(plan.id, now, now + 5) for i in range(8))
                )
                assert [state.token for state in taken if state is not None] == [turn]

        within(open_store, body, stores)

    def test_a_fold_counts_only_for_the_newest_token_and_never_goes_back(self, open_store):
        """A folder that wakes up late changes nothing; blocks that came meanwhile stay unfolded."""

        async def body(store):
            plan = await opened(store)
            await append(store, plan, *steps("w", 1, 6))
            await store.sweeps.lease(plan.id, 1.0, 2.0)
            await store.sweeps.lease(plan.id, 3.0, 4.0)
            before = await everything(store, plan)
            for token in (0, 1, 3):
                assert await store.sweeps.record_fold(plan.id, token, 4, "old", 9.0) is False
            assert await everything(store, plan) == before
            assert await store.sweeps.record_fold(plan.id, 2, 4, "4-2", 9.0) is True
            state = await append(store, plan, step("w", 7))
            assert (state.folded, state.manifest, state.folded_at, state.head) == (4, "4-2", 9.0, 7)
            assert state.unfolded_bytes == 3 * 8
            assert await store.sweeps.record_fold(plan.id, 2, 3, "3-2", 10.0) is False
            assert (await store.sweeps.get(plan.id))[1] == state
            assert await store.sweeps.record_fold(plan.id, 2, 7, "7-2", 10.0) is True
            assert (await store.sweeps.get(plan.id))[1].unfolded_bytes == 0

        within(open_store, body)

    def test_dropping_takes_only_what_is_folded(self, open_store):
        """However far it is asked to go; the state does not change, and doing it again is harmless."""

        async def body(store):
            plan = await opened(store)
            await append(store, plan, *steps("w", 1, 6))
            await store.sweeps.drop(plan.id, 6)
            assert await seqs(store, plan) == [1, 2, 3, 4, 5, 6]
            state = await folded(store, plan, 4)
            await store.sweeps.drop(plan.id, 2)
            assert await seqs(store, plan) == [5, 6]
            for _ in range(2):
                await store.sweeps.drop(plan.id, 99)
                assert await seqs(store, plan) == [5, 6]
                assert (await store.sweeps.get(plan.id))[1] == state

        within(open_store, body)

    # --- the end ---------------------------------------------------------------------------------------------------

    async def sealed_and_folded(self, store: MetadataStore, **plan: Any) -> tuple[Record, Plan, int]:
        one, made, state = new_sweep(**plan)
        await store.sweeps.open(one, made, state, [])
        await append(store, made, *steps("w", 1, 3))
        await store.sweeps.seal(made.id, "complete", Ending({"w": 3}), NOW)
        state = await store.sweeps.lease(made.id, 1.0, 9.0)
        assert await store.sweeps.record_fold(made.id, state.token, 3, "3-1", 2.0)
        return one, made, state.token

    def test_a_sweep_ends_once_with_its_record_in_place(self, open_store):
        """Record and mark in one step; the log is still read for its state, and nothing is left to do."""

        async def body(store):
            one, plan, token = await self.sealed_and_folded(store)
            assert [p for p, _ in await store.sweeps.unfinished()] == [plan]
            final = changed(one, state="complete")
            assert await store.sweeps.end(plan.id, token, final, 1) == "ended"
            assert await store.get(plan.id) == final
            state = (await store.sweeps.get(plan.id))[1]
            assert (state.ended_revision, state.leased_until) == (2, 0.0)
            assert await store.sweeps.unfinished() == []
            assert await store.sweeps.end(plan.id, token, changed(final), 2) == "fenced"
            assert await store.get(plan.id) == final
            await append(store, plan, step("w", 3))
            appended = await store.sweeps.append(plan.id, [step("w", 4)], LATER)
            assert appended.refused.code == "finished"
            assert await store.sweeps.seal(plan.id, "complete", Ending({"w": 3}), LATER) == state

        within(open_store, body)

    @pytest.mark.parametrize("lack", ["token", "seal", "fold"])
    def test_an_end_that_is_not_due_is_fenced_and_changes_nothing(self, open_store, lack):
        """Another has the lease; the log is open; blocks are not folded."""

        async def body(store):
            one, plan, state = new_sweep()
            await store.sweeps.open(one, plan, state, [])
            await append(store, plan, *steps("w", 1, 3))
            if lack != "seal":
                await store.sweeps.seal(plan.id, "complete", Ending(), NOW)
            token = (await store.sweeps.lease(plan.id, 1.0, 9.0)).token
            assert await store.sweeps.record_fold(plan.id, token, 2 if lack == "fold" else 3, "x", 2.0)
            if lack == "token":
                assert await store.sweeps.lease(plan.id, 10.0, 19.0) is not None
            before = await everything(store, plan)
            assert await store.sweeps.end(plan.id, token, changed(one, state="complete"), 1) == "fenced"
            assert await store.get(plan.id) == one
            assert await everything(store, plan) == before

        within(open_store, body)

    def test_an_end_over_a_changed_record_is_stale_and_changes_nothing(self, open_store):
        """Somebody patched the document meanwhile: it is to be read again."""

        async def body(store):
            one, plan, token = await self.sealed_and_folded(store)
            patched = changed(one, comment="good")
            assert await store.replace(patched, 1)
            before = await everything(store, plan)
            assert await store.sweeps.end(plan.id, token, changed(one, state="complete"), 1) == "stale"
            assert await store.get(plan.id) == patched
            assert await everything(store, plan) == before
            final = changed(patched, state="complete")
            assert await store.sweeps.end(plan.id, token, final, 2) == "ended"
            assert await store.get(plan.id) == final
            assert (await store.sweeps.get(plan.id))[1].ended_revision == 3

        within(open_store, body)

    # --- what is left to do ----------------------------------------------------------------------------------------

    def test_unfinished_are_those_with_blocks_to_fold_ends_to_publish_or_addresses_to_tell(self, open_store):
        """At every step of a sweep's life; others and deleted ones are left alone."""

        async def body(store):
            async def listed() -> list[str]:
                found = await store.sweeps.unfinished()
                assert all([await store.sweeps.get(plan.id) == (plan, state) for plan, state in found])
                return [plan.id for plan, _ in found]

            idle = await opened(store)
            one, plan, state = new_sweep(notify=("http://a", "http://b"))
            await store.sweeps.open(one, plan, state, [])
            assert await listed() == []
            await append(store, plan, step("w", 1))
            assert await listed() == [plan.id]
            await folded(store, plan, 1)
            assert await listed() == []
            await store.sweeps.seal(plan.id, "abandoned", Ending(), NOW)
            assert await listed() == [plan.id]
            token = (await store.sweeps.lease(plan.id, 10.0, 19.0)).token
            assert await store.sweeps.end(plan.id, token, changed(one, state="abandoned"), 1) == "ended"
            assert await listed() == [plan.id]
            await store.sweeps.tell(plan.id, "http://b")
            await store.sweeps.tell(plan.id, "http://b")
            assert (await store.sweeps.get(plan.id))[1].told == ("http://b",)
            assert await listed() == [plan.id]
            await store.sweeps.tell(plan.id, "http://a")
            assert await listed() == []
            gone_record, gone, state = new_sweep()
            await store.sweeps.open(gone_record, gone, state, [])
            await append(store, gone, step("w", 1))
            await append(store, idle, step("w", 1))
            assert sorted(await listed()) == sorted([idle.id, gone.id])
            assert await store.replace(changed(gone_record, state="deleted"), 1)
            assert await listed() == [idle.id]

        within(open_store, body)

    # --- any order -------------------------------------------------------------------------------------------------

    @settings(max_examples=settings().max_examples // 3)
    @given(
        st.lists(
            st.one_of(
                st.tuples(st.just("append"), st.sampled_from("vw"), st.integers(1, 6), st.integers(1, 3)),
                st.tuples(st.just("fold"), st.integers(0, 12)),
                st.tuples(st.just("drop"), st.integers(0, 12)),
                st.tuples(st.just("lease"), st.integers(0, 30)),
                st.tuples(st.just("renew"), st.integers(0, 4), st.integers(0, 30)),
                st.tuples(st.just("seal"), st.sampled_from(["complete", "abandoned"]), st.integers(0, 4)),
            ),
            max_size=25,
        )
    )
    def test_any_sequence_of_steps_leaves_what_a_plain_model_has(self, open_store, sequence):  # noqa: C901
        """Appends of one writer's numbers, folds of any token, drops, leases and seals in any order."""

        async def body(store):  # noqa: C901
            plan = await opened(store)
            model, rows, dropped = State(extents={"x": 0}), [], 0
            for action, *arguments in sequence:
                if action == "append":
                    writer, n, count = arguments
                    block = step(writer, n, min(count, n))
                    appended = await store.sweeps.append(plan.id, [block], NOW)
                    try:
                        found = place(plan, model, block.header, NOW)
                        assert (appended.stored, appended.refused) == (1, None)
                        if found is not None:
                            model = found[0]
                            rows.append(Row(found[1], block.payload, ""))
                    except AqDataError as exc:
                        assert (appended.stored, str(appended.refused)) == (0, str(exc))  # noqa: PT017
                elif action == "fold":
                    [through] = arguments
                    through = min(through, model.head)
                    is_good = through >= model.folded
                    assert await store.sweeps.record_fold(plan.id, model.token, through, f"{through}", 1.0) is is_good
                    if is_good:
                        left = sum(8 for row in rows if row.placed.seq > through)
                        model = msgspec.structs.replace(
                            model, folded=through, manifest=f"{through}", folded_at=1.0, unfolded_bytes=left
                        )
                elif action == "drop":
                    await store.sweeps.drop(plan.id, *arguments)
                    dropped = max(dropped, min(model.folded, *arguments))
                elif action == "lease":
                    [now] = arguments
                    taken = await store.sweeps.lease(plan.id, float(now), now + 5.0)
                    if model.leased_until > now:
                        assert taken is None
                    else:
                        model = msgspec.structs.replace(model, token=model.token + 1, leased_until=now + 5.0)
                        assert taken == model
                elif action == "renew":
                    token, until = arguments
                    assert await store.sweeps.renew(plan.id, token, float(until)) is (token == model.token)
                    if token == model.token:
                        model = msgspec.structs.replace(model, leased_until=float(until))
                else:
                    outcome, n = arguments
                    try:
                        sealed = sweeps.seal(plan, model, outcome, Ending({"w": n}), NOW)
                        model = sealed or model
                        assert await store.sweeps.seal(plan.id, outcome, Ending({"w": n}), NOW) == model
                    except ConflictError as exc:
                        with pytest.raises(ConflictError) as failure:
                            await store.sweeps.seal(plan.id, outcome, Ending({"w": n}), NOW)
                        assert failure.value.code == exc.code  # noqa: PT017
                assert (await store.sweeps.get(plan.id)) == (plan, model)
                tail = await store.sweeps.tail(plan.id)
                assert tail == Tail(plan, model, tuple(row for row in rows if row.placed.seq > model.folded))
                pending = [state for p, state in await store.sweeps.unfinished() if p.id == plan.id]
                assert pending == ([model] if model.seal is not None or model.head > model.folded else [])

        within(open_store, body)


class DurableSweepLogTests(SweepLogTests):
    """What a sweep log promises that several processes open at once."""

    def test_many_writers_in_two_processes_lose_nothing_and_interleave_whole_blocks(self, open_store):
        """As in one process."""
        self.check_concurrent(open_store, 2)

    def test_a_reader_of_another_process_sees_one_moment(self, open_store):
        """As in one process."""
        self.check_moments(open_store, 2)

    def test_appends_and_seals_of_two_processes_have_one_order(self, open_store):
        """As in one process."""
        self.check_sealing(open_store, 2)

    def test_of_two_processes_that_want_the_lease_one_has_it(self, open_store):
        """As in one process."""
        self.check_leases(open_store, 3)

    def test_what_was_acknowledged_is_there_when_the_database_is_opened_again(self, open_store):
        """State, blocks, leases and the list of what is to be done."""

        async def write(store):
            plan = await opened(store)
            await append(store, plan, *steps("w", 1, 5))
            await folded(store, plan, 2)
            await store.sweeps.drop(plan.id, 2)
            assert await store.sweeps.lease(plan.id, 10.0, 19.0) is not None
            return plan, await everything(store, plan), await store.sweeps.unfinished()

        async def read(store):
            assert await everything(store, plan) == before
            assert await store.sweeps.unfinished() == unfinished
            assert await store.sweeps.lease(plan.id, 11.0, 20.0) is None
            assert (await append(store, plan, step("w", 6))).head == 6

        plan, before, unfinished = within(open_store, write)
        within(open_store, read)

    def test_a_sweep_deleted_or_opened_by_another_process_is_so_here_too(self, open_store):
        """Nothing of it is remembered wrongly."""

        async def body(one_store, other_store):
            one, plan, state = new_sweep()
            with pytest.raises(NotFoundError):
                await other_store.sweeps.get(plan.id)
            await one_store.sweeps.open(one, plan, state, [])
            await append(other_store, plan, step("w", 1))
            await append(one_store, plan, step("w", 2))
            assert await one_store.replace(changed(one, state="deleted"), 1)
            with pytest.raises(NotFoundError) as failure:
                await other_store.sweeps.append(plan.id, [step("w", 3)], NOW)
            assert failure.value.code == "deleted"
            await one_store.sweeps.forget(plan.id)
            with pytest.raises(NotFoundError):
                await other_store.sweeps.tail(plan.id)

        within(open_store, body, 2)
