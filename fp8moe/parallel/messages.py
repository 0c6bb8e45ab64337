"""Make every message of a schedule an action: sends after what they carry, receives one computation ahead.

A SEND stands right behind the computation whose output it carries. Its RECV stands one computation before the one that
needs it, so that the message travels under that computation; earlier only where a link would otherwise receive in
another order than it sends, later never. Posting every receive at the start of the step was refused: it costs a buffer
for each message of the step, and one in flight a link is what hides a message.
"""

from collections import defaultdict
from dataclasses import replace

from fp8moe.parallel.action import Action, Kind, Schedule


def receives(schedule: Schedule, action: Action) -> list[Action]:
    """The messages that must have arrived before a compute action starts."""
    wanted = []
    for kind, stage, microbatch, direction in action.parts():
        step = {Kind.F: -1, Kind.B: +1}.get(kind)
        peer = None if step is None else schedule.neighbour(stage, direction, step)
        if peer is not None:
            message = Kind.RECV_F if kind is Kind.F else Kind.RECV_B
            wanted.append(Action(message, stage, microbatch, direction, peer=peer, phase=action.phase))
    return wanted


def sends(schedule: Schedule, action: Action) -> list[Action]:
    """The messages that leave when a compute action is done."""
    leaving = []
    for kind, stage, microbatch, direction in action.parts():
        step = {Kind.F: +1, Kind.B: -1}.get(kind)
        peer = None if step is None else schedule.neighbour(stage, direction, step)
        if peer is not None:
            message = Kind.SEND_F if kind is Kind.F else Kind.SEND_B
            leaving.append(Action(message, stage, microbatch, direction, peer=peer, phase=action.phase))
    return leaving


def with_messages(schedule: Schedule) -> Schedule:
    """The same computations in the same order, with every SEND and RECV among them (those there before are dropped)."""
    compute = [[action for action in actions if not action.kind.is_message] for actions in schedule.actions]
    arriving: dict[tuple[int, tuple[Kind, int, int]], tuple[int, Action]] = {}
    for rank, actions in enumerate(compute):
        for index, action in enumerate(actions):
            for receive in receives(schedule, action):
                arriving[rank, receive.message] = (index, receive)

    on_link: dict[tuple[int, int], list[Action]] = defaultdict(list)
    for rank, actions in enumerate(compute):
        for action in actions:
            for send in sends(schedule, action):
                assert send.peer is not None
                on_link[rank, send.peer].append(send)

    posted: dict[tuple[int, int], list[Action]] = defaultdict(list)
    for (_, rank), messages in sorted(on_link.items()):
        # From the last message of the link back: none is posted after one that is sent later.
        latest = len(compute[rank])
        in_reverse = []
        for send in reversed(messages):
            index, receive = arriving[rank, send.message]
            latest = min(latest, max(0, index - 1))
            in_reverse.append((latest, receive))
        for index, receive in reversed(in_reverse):
            posted[rank, index].append(replace(receive, phase=compute[rank][index].phase))

    lists = []
    for rank, actions in enumerate(compute):
        merged: list[Action] = []
        for index, action in enumerate(actions):
            merged += [*posted[rank, index], action, *sends(schedule, action)]
        lists.append(tuple(merged))
    return replace(schedule, actions=tuple(lists))
