"""A model of the sweep protocol as it is built, and the search that walks through every interleaving of it.

Two chunks of two cells; blocks that cover parts of both and overwrite one another. Every step below is one atomic step of the
real thing: a transaction of the metadata store, or one object put, read or removed. A process may stop for ever after any step
(a crash, or a pause without end), because what must hold is looked at in every state. `rules` names what is left out or done
wrong: each of those must be found.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

# --- the search ------------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What a search found: `trace` is a shortest way to what is wrong, None when nothing is."""

    states: int
    reason: str
    trace: list[str] | None


def explore(
    start: Hashable, moves: Callable[[Any], Iterator[tuple[str, Hashable]]], wrong: Callable[[Any], str], most: int
) -> Outcome:
    """Every state that can be reached, nearest first, until one is wrong. Raises when there are more than `most`."""
    came_from: dict[Hashable, tuple[Hashable, str] | None] = {start: None}
    frontier: deque[Hashable] = deque([start])
    while frontier:
        state = frontier.popleft()
        for label, after in moves(state):
            if after in came_from:
                continue
            came_from[after] = (state, label)
            reason = wrong(after)
            if reason:
                return Outcome(len(came_from), reason, _way_to(after, came_from))
            if len(came_from) > most:
                raise RuntimeError(f"over {most} states: make the scenario smaller")
            frontier.append(after)
    return Outcome(len(came_from), "", None)


def _way_to(state: Hashable, came_from: dict[Hashable, tuple[Hashable, str] | None]) -> list[str]:
    labels: list[str] = []
    while (step := came_from[state]) is not None:
        state = step[0]
        labels.append(step[1])
    labels.reverse()
    return labels


# --- the world -------------------------------------------------------------------------------------------------------------

Name = tuple[str, int]
"""A block: its writer and the writer's number."""
CELLS: dict[Name, str] = {("w", 1): "bc", ("w", 2): "cd", ("v", 1): "ab", ("w", 3): "ad"}
"""Chunk 0 is the cells a and b, chunk 1 is c and d: the first block of `w` lies over both."""
CHUNKS = ("ab", "cd")
EMPTY = ("", "")


class World(NamedTuple):
    """What is stored, and, from `history` on, what only the onlooker knows."""

    head: int = 0
    known: tuple[tuple[str, int], ...] = (("v", 0), ("w", 0))
    rows: tuple[tuple[int, Name], ...] = ()
    folded: int = 0
    manifest: str = ""
    token: int = 0
    sealed: str = ""
    ended: str = ""
    objects: frozenset[tuple[str, Any]] = frozenset()
    retired: frozenset[str] = frozenset()
    history: tuple[Name, ...] = ()
    first_seal: str = ""
    wrong: str = ""


Local = tuple[Any, ...]
Step = tuple[str, World, Local]
DONE: Local = ("done",)


def laid_over(
    values: tuple[str, ...], chunk: int, blocks: Iterator[Name] | tuple[Name, ...] | list[Name]
) -> tuple[str, ...]:
    """A chunk's cells after blocks were written over them in turn."""
    cells = list(values)
    for writer, n in blocks:
        for i, cell in enumerate(CHUNKS[chunk]):
            if cell in CELLS[writer, n]:
                cells[i] = f"{writer}{n}"
    return tuple(cells)


def found(world: World, key: str) -> Any:
    """An object's content; None when there is none."""
    return next((content for name, content in world.objects if name == key), None)


def put(world: World, key: str, content: Any) -> World:
    """An object is written, over an older one if there is one."""
    return world._replace(objects=frozenset(o for o in world.objects if o[0] != key) | {(key, content)})


def removed(world: World, keys: frozenset[str]) -> World:
    """Objects are deleted."""
    return world._replace(objects=frozenset(o for o in world.objects if o[0] not in keys), retired=world.retired - keys)


def wrong(state: tuple[World, tuple[Local, ...]]) -> str:
    """What a reader who comes now and is quick would find amiss; "" when all is well."""
    world = state[0]
    if world.wrong:
        return world.wrong
    if len(set(world.history)) < len(world.history):
        return f"a block stands in the order twice: {world.history}"
    if world.ended and world.ended != world.first_seal:
        return f"ended as {world.ended}, though it was sealed as {world.first_seal} first"
    keys = final_keys() if world.ended else found(world, world.manifest) if world.manifest else ("", "")
    if keys is None:
        return "the manifest in force is gone"
    beyond = [] if world.ended else [name for seq, name in world.rows if seq > world.folded]
    for chunk, key in enumerate(keys):
        stored = found(world, key) if key else EMPTY
        if stored is None:
            return f"an object in force is gone: {key}"
        expected = laid_over(EMPTY, chunk, world.history)
        if laid_over(stored, chunk, beyond) != expected:
            return f"chunk {chunk} reads {laid_over(stored, chunk, beyond)}, not {expected}"
    return ""


def final_keys() -> tuple[str, ...]:
    """Where the finished chunks lie."""
    return ("final/0", "final/1")


# --- who takes part ----------------------------------------------------------------------------------------------------------


def writer(
    name: str, last: int, retries: int, rules: frozenset[str]
) -> tuple[Local, Callable[[World, Local], Iterator[Step]]]:
    """Sends its blocks in turn; an answer may be lost on the way, then the block is sent again."""

    def step(world: World, local: Local) -> Iterator[Step]:
        if local[0] == "send":
            _, n, left = local
            known = dict(world.known)[name]
            repeat = n <= known and "retry_takes_a_second_place" not in rules
            if world.ended or (world.sealed and "no_seal" not in rules and not repeat):
                yield f"{name}{n} is refused", world, DONE
                return
            if "place_taken_before" in rules and not repeat:
                yield f"{name} looks at head", world, ("insert", n, left, world.head + 1)
                return
            after = world if repeat else _appended(world, name, n, world.head + 1)
            yield from _answered(after, n, left)
        elif local[0] == "insert":
            _, n, left, seq = local
            yield from _answered(_appended(world, name, n, seq), n, left)

    def _answered(after: World, n: int, left: int) -> Iterator[Step]:
        yield f"append {name}{n}", after, ("send", n + 1, left) if n < last else DONE
        if left:
            yield f"append {name}{n}, answer lost", after, ("send", n, left - 1)

    return ("send", 1, retries), step


def _appended(world: World, name: str, n: int, seq: int) -> World:
    known = tuple((who, n if who == name else m) for who, m in world.known)
    rows = tuple(sorted({**dict(world.rows), seq: (name, n)}.items()))
    return world._replace(head=max(world.head, seq), known=known, rows=rows, history=(*world.history, (name, n)))


def sealer(outcome: str, rules: frozenset[str]) -> tuple[Local, Callable[[World, Local], Iterator[Step]]]:
    """Asks for the end."""

    def step(world: World, local: Local) -> Iterator[Step]:
        if local == DONE or world.ended:
            return
        if not world.sealed or "last_seal_wins" in rules:
            first = world.first_seal or outcome
            yield f"seal as {outcome}", world._replace(sealed=outcome, first_seal=first), DONE

    return ("ask",), step


def remover(rules: frozenset[str]) -> tuple[Local, Callable[[World, Local], Iterator[Step]]]:
    """Removes what was replaced, at any time after it was."""

    def step(world: World, local: Local) -> Iterator[Step]:
        if world.retired:
            yield "remove replaced objects", removed(world, world.retired), local
        if "remove_what_is_not_named" in rules:
            named = {world.manifest, *final_keys(), *(found(world, world.manifest) or ())}
            strangers = frozenset(key for key, _ in world.objects if key not in named)
            if strangers:
                yield "remove what the manifest does not name", removed(world, strangers), local

    return ("on",), step


def reader(rules: frozenset[str]) -> tuple[Local, Callable[[World, Local], Iterator[Step]]]:
    """One transaction for the state and the rows beyond what is folded, then the objects; from the start when one is gone."""

    def seen(world: World) -> tuple[tuple[int, Name], ...]:
        return tuple(row for row in world.rows if row[0] > world.folded or "overlay_all_rows" in rules)

    def step(world: World, local: Local) -> Iterator[Step]:
        kind = local[0]
        if kind == "start" and "rows_read_apart" in rules:
            yield "read the state", world, ("state", world.manifest, world.folded, world.head, world.ended)
        elif kind == "start":
            yield "read state and rows", world, ("view", world.manifest, seen(world), world.head, world.ended)
        elif kind == "state":
            _, manifest, folded, head, ended = local
            rows = tuple(row for row in world.rows if folded < row[0] <= head)
            yield "read the rows", world, ("view", manifest, rows, head, ended)
        elif kind == "view":
            _, manifest, rows, head, ended = local
            keys = final_keys() if ended else found(world, manifest) if manifest else ("", "")
            if keys is None:
                yield "the manifest is gone, start over", world, ("start",)
            else:
                yield "read the manifest", world, ("chunk", 0, keys, () if ended else rows, head)
        elif kind == "chunk":
            _, chunk, keys, rows, head = local
            content = found(world, keys[chunk]) if keys[chunk] else EMPTY
            if content is None and "absence_is_fill" in rules:
                content = EMPTY
            if content is None:
                yield "an object is gone, start over", world, ("start",)
                return
            got = laid_over(content, chunk, [name for _, name in rows])
            expected = laid_over(EMPTY, chunk, world.history[:head])
            if got != expected:
                reason = f"a reader at {head} got chunk {chunk} as {got}, not {expected}"
                world = world._replace(wrong=reason)
            yield f"read chunk {chunk}", world, DONE if chunk else ("chunk", 1, keys, rows, head)

    return ("start",), step


class Fold(NamedTuple):
    """A folder's own memory: its token, what it read, what is left to do."""

    at: str
    rounds: int
    token: int = 0
    base: tuple[str, ...] = ("", "")
    manifest: str = ""
    rows: tuple[tuple[int, Name], ...] = ()
    todo: tuple[int, ...] = ()
    cut: int = 0
    read: tuple[str, ...] = ()
    new: tuple[str, ...] = ()


def folder(name: str, rounds: int, rules: frozenset[str]) -> tuple[Local, Callable[[World, Local], Iterator[Step]]]:
    """Takes the lease, whoever had it (its time may always have run out), folds a prefix of the log, and ends a sealed sweep."""

    def step(world: World, local: Local) -> Iterator[Step]:
        if local == DONE:
            return
        mine = Fold(*local)
        for label, after, then in _STEPS[mine.at](world, mine, rules):
            yield f"{name} {label}", after, tuple(then) if isinstance(then, Fold) else then

    return tuple(Fold("lease", rounds)), step


def _lease(world: World, mine: Fold, rules: frozenset[str]) -> Iterator[tuple[str, World, Any]]:
    is_work = world.head > world.folded or world.sealed
    if is_work and not world.ended and mine.rounds:
        yield "takes the lease", world._replace(token=world.token + 1), mine._replace(at="tail", token=world.token + 1)


def _tail(world: World, mine: Fold, rules: frozenset[str]) -> Iterator[tuple[str, World, Any]]:
    if world.token != mine.token and "no_token_check" not in rules:
        yield "finds the lease lost", world, DONE
        return
    base = found(world, world.manifest) if world.manifest else ("", "")
    if base is None or world.ended:
        yield "finds it ended", world, DONE
        return
    rows = tuple(row for row in world.rows if row[0] > world.folded)
    then = mine._replace(base=base, manifest=world.manifest)
    may_end = (world.sealed or "no_seal" in rules or "final_keys_while_open" in rules) and not world.ended
    if not rows and may_end and world.head:
        yield "reads that all is folded", world, then._replace(at="publish", todo=(0, 1), rows=())
    elif not rows:
        yield "finds nothing to do", world, DONE
    for taken in {rows[:1], rows} if rows else ():
        folding = taken[-1:] if "not_a_prefix" in rules else taken
        touched = tuple(c for c in (0, 1) if any(set(CHUNKS[c]) & set(CELLS[block]) for _, block in folding))
        if "whole_chunks_only" in rules:
            touched = touched[:1]
        at = "drop" if "drop_before_record" in rules else "read"
        yield (
            f"reads rows to {taken[-1][0]}",
            world,
            then._replace(at=at, rows=folding, todo=touched, cut=taken[-1][0], new=base),
        )


def _generation(mine: Fold, rules: frozenset[str]) -> str:
    return f"{mine.cut}" if "keys_without_token" in rules else f"{mine.cut}-{mine.token}"


def _read(world: World, mine: Fold, rules: frozenset[str]) -> Iterator[tuple[str, World, Any]]:
    chunk = mine.todo[0]
    old = found(world, mine.base[chunk]) if mine.base[chunk] else EMPTY
    if old is None:
        yield "finds an object gone and gives up", world, DONE
        return
    values = laid_over(old, chunk, [name for _, name in mine.rows])
    key = f"{chunk}" if "chunks_in_place" in rules else f"{_generation(mine, rules)}/{chunk}"
    new = tuple(key if i == chunk else k for i, k in enumerate(mine.new))
    then = mine._replace(at="put", read=values, new=new)
    if "chunks_in_place" in rules:
        yield f"reads chunk {chunk}", world, then
    else:  # what was read never changes: reading and putting may be one step
        yield from _put(world, then, rules)


def _put(world: World, mine: Fold, rules: frozenset[str]) -> Iterator[tuple[str, World, Any]]:
    chunk, *left = mine.todo
    then = mine._replace(at="read" if left else "manifest", todo=tuple(left), read=())
    yield f"puts chunk {chunk} to {mine.cut}", put(world, mine.new[chunk], mine.read), then


def _manifest(world: World, mine: Fold, rules: frozenset[str]) -> Iterator[tuple[str, World, Any]]:
    key = f"{_generation(mine, rules)}/manifest"
    yield "puts the manifest", put(world, key, mine.new), mine._replace(at="record")


def _record(world: World, mine: Fold, rules: frozenset[str]) -> Iterator[tuple[str, World, Any]]:
    generation = _generation(mine, rules)
    if (world.token != mine.token and "no_token_check" not in rules) or (
        mine.cut < world.folded and "no_cut_check" not in rules
    ):
        yield "is refused at record", world, mine._replace(at="discard")
        return
    replaced = {old for old, new in zip(mine.base, mine.new, strict=True) if old and old != new}
    replaced |= {mine.manifest} if mine.manifest else set()
    folded = max(world.folded, mine.cut)
    after = world._replace(folded=folded, manifest=f"{generation}/manifest", retired=world.retired | replaced)
    if "remove_at_once" in rules:
        after = removed(after, frozenset(replaced))
    at = _again(mine) if "drop_before_record" in rules else mine._replace(at="drop")
    yield f"records {mine.cut}", after, at


def _again(mine: Fold) -> Any:
    return Fold("tail", mine.rounds - 1, mine.token) if mine.rounds > 1 else DONE


def _drop(world: World, mine: Fold, rules: frozenset[str]) -> Iterator[tuple[str, World, Any]]:
    """Row by row, the newest first: more than is needed, SQLite drops them in one transaction."""
    if "drop_before_record" in rules:
        kept = tuple(row for row in world.rows if row[0] > mine.cut)
        yield "drops its rows", world._replace(rows=kept), mine._replace(at="read")
        return
    through = min(mine.cut, world.folded)
    old = [row for row in world.rows if row[0] <= through]
    if old[1:]:
        yield "drops a row", world._replace(rows=tuple(row for row in world.rows if row != old[-1])), mine
        return
    then = _again(mine)
    if "token_of_another" in rules and isinstance(then, Fold):  # goes on with the state that it read last
        then = then._replace(token=world.token)
    yield "drops the last row", world._replace(rows=tuple(row for row in world.rows if row not in old)), then


def _discard(world: World, mine: Fold, rules: frozenset[str]) -> Iterator[tuple[str, World, Any]]:
    below = f"{_generation(mine, rules)}/"
    yield "discards what it made", removed(world, frozenset(k for k, _ in world.objects if k.startswith(below))), DONE


def _publish(world: World, mine: Fold, rules: frozenset[str]) -> Iterator[tuple[str, World, Any]]:
    chunk, *left = mine.todo
    content = found(world, mine.base[chunk]) if mine.base[chunk] else EMPTY
    if content is None:
        yield "finds an object gone and gives up", world, DONE
        return
    then = mine._replace(at="publish" if left else "end", todo=tuple(left))
    after = world if found(world, f"final/{chunk}") is not None else put(world, f"final/{chunk}", content)
    yield f"publishes chunk {chunk}", after, then


def _end(world: World, mine: Fold, rules: frozenset[str]) -> Iterator[tuple[str, World, Any]]:
    if "no_seal" in rules:
        after = world._replace(ended="complete", first_seal="complete")
        yield "sets complete", after, DONE
        return
    if world.token != mine.token or not world.sealed or world.folded != world.head or world.ended:
        yield "is refused at the end", world, DONE
        return
    opened = frozenset(key for key, _ in world.objects if not key.startswith("final/"))
    yield f"sets {world.sealed}", world._replace(ended=world.sealed, retired=opened), DONE


_STEPS = {
    "lease": _lease,
    "tail": _tail,
    "read": _read,
    "put": _put,
    "manifest": _manifest,
    "record": _record,
    "drop": _drop,
    "discard": _discard,
    "publish": _publish,
    "end": _end,
}


# --- scenarios ---------------------------------------------------------------------------------------------------------------

Process = tuple[Local, Callable[[World, Local], Iterator[Step]]]


def check(processes: list[Process], most: int = 2_000_000) -> Outcome:
    """Walk through every interleaving of the processes."""
    steps = [step for _, step in processes]

    def moves(state: tuple[World, tuple[Local, ...]]) -> Iterator[tuple[str, Hashable]]:
        world, locals_ = state
        for i, step in enumerate(steps):
            if locals_[i] != DONE:
                for label, after, then in step(world, locals_[i]):
                    yield label, (after, (*locals_[:i], then, *locals_[i + 1 :]))

    return explore((World(), tuple(local for local, _ in processes)), moves, wrong, most)


def folding(rules: frozenset[str] = frozenset(), blocks: int = 1) -> list[Process]:
    """Two writers, two folders that may sleep at any step, a reader, and replaced objects that may go at any time."""
    return [
        writer("w", blocks, 0, rules),
        writer("v", 1, 0, rules),
        folder("A", 2, rules),
        folder("B", blocks, rules),
        reader(rules),
        remover(rules),
    ]


def retrying(rules: frozenset[str] = frozenset(), blocks: int = 2) -> list[Process]:
    """Two writers whose answers get lost, and a folder that removes rows under their hands."""
    return [writer("w", blocks, 2, rules), writer("v", 1, 1, rules), folder("A", 2, rules), reader(rules), remover(rules)]


def finishing(rules: frozenset[str] = frozenset(), blocks: int = 2) -> list[Process]:
    """A writer, two that ask for different ends, two folders that fold, publish and end."""
    return [
        writer("w", blocks, 1, rules),
        sealer("complete", rules),
        sealer("abandoned", rules),
        folder("A", 2, rules),
        folder("B", 2, rules),
        remover(rules),
    ]


def sleeping(rules: frozenset[str] = frozenset(), blocks: int = 2) -> list[Process]:
    """Two folders, one of which sleeps between two folds; nobody else."""
    return [writer("w", blocks, 0, rules), writer("v", 1, 0, rules), folder("A", 2, rules), folder("B", 2, rules)]
