"""Learner and actor hosts over loopback: who is welcome, what is counted, who waits for whom."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import re
import shutil
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
import zmq.asyncio

from asyncagent import conversation, wire
from asyncagent.__main__ import main
from asyncagent.errors import Stalled
from asyncagent.formats import RowFormat
from asyncagent.host import ActorHost, HostFlags
from asyncagent.keys import AllowedKeys, load_public, load_secret, make_keys
from asyncagent.members import Members
from asyncagent.metrics import HostsReport
from asyncagent.remote import LOST_S, TICK_S, Listener, RemoteBridge
from asyncagent.structs import ArraySpec
from asyncagent.wire import (
    Accepted,
    Act,
    Bye,
    Hello,
    Ping,
    Pong,
    Refused,
    RowSent,
    Unknown,
    WantWeights,
    WeightsSent,
    Welcome,
)
from tests.fakes import CounterGroup
from tests.relay import Relay, Weather
from tests.remote_fakes import (
    CONFIG,
    SPEC,
    WATCHDOG_S,
    Clock,
    Environments,
    Peer,
    Run,
    T,
    bridge_of,
    host_of,
    until,
)

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts that ask sooner, so that nobody waits for seconds."""
    monkeypatch.setattr(conversation, "PING_S", 0.1)
    monkeypatch.setattr(conversation, "FIRST_BACKOFF_S", 0.05)
    monkeypatch.setattr(conversation, "BYE_MS", 2000)


@pytest.fixture
def environments(monkeypatch: pytest.MonkeyPatch) -> Environments:
    """The hosts' environments are counters."""
    made = Environments()
    monkeypatch.setattr("asyncagent.host.make_group", made)
    monkeypatch.setattr("asyncagent.host.usable_spec", lambda config: SPEC)
    return made


def play(test: Coroutine[Any, Any, None]) -> None:
    """On an event loop of its own, with a watchdog."""

    async def watched() -> None:
        async with asyncio.timeout(2 * WATCHDOG_S):
            await test

    asyncio.run(watched())


@asynccontextmanager
async def scene(
    *peers: str, clock: Callable[[], float] | None = None, run: Run | None = None, **flags: Any
) -> AsyncIterator[tuple[Any, ...]]:
    """A run, its bridge, and peers of those names that have not said anything."""
    run = run or Run(dataclasses.replace(CONFIG, **flags))
    async with bridge_of(run, clock) as bridge:
        there = [Peer(bridge.endpoint) for _ in peers]
        try:
            yield run, bridge, *there
        finally:
            for peer in there:
                peer.close()


# Membership.


def test_a_welcome_holds_all_that_a_host_needs(tmp_path: Path) -> None:
    """Groups, levels, spec, config and credits are in it; the learner's own files are not."""

    async def test() -> None:
        async with scene("a", logdir=str(tmp_path), secret_key="k", allowed_keys="f") as found:
            run, bridge, peer = found
            welcome = await peer.join()
            assert welcome.session == bridge.session
            assert welcome.num_weights == run.num_weights
            assert [group.num_envs for group in welcome.groups] == [2, 2, 2, 2]
            assert {group.level_name for group in welcome.groups} == {"catch"}
            assert (welcome.credits, welcome.received, welcome.version) == (4, 0, 0)
            config = json.loads(welcome.config)
            assert config["unroll_length"] == T
            assert str(tmp_path) not in welcome.config
            assert config["secret_key"] == config["allowed_keys"] == ""
            assert json.loads(welcome.spec)

    play(test())


def test_slots_levels_and_environments_do_not_overlap() -> None:
    """Each group has a number of its own, which decides its level; each environment, too."""

    async def test() -> None:
        flags: dict[str, Any] = {
            "level_name": "catch,memory,cartpole",
            "num_actors": 12,
            "num_groups": 3,
        }
        async with scene("a", "b", "c", **flags) as (_, bridge, one, two, three):
            groups = (await one.join()).groups + (await two.join(inference="learner")).groups
            assert [group.slot for group in groups] == list(range(3, 11))
            levels = ["catch", "memory", "cartpole"]
            assert [group.level_name for group in groups] == [
                levels[group.slot % 3] for group in groups
            ]
            indices = [group.first_env_index + n for group in groups for n in range(2)]
            assert indices == list(range(12, 28))
            await one.say(Bye())
            # What comes over another connection may overtake it.
            await until(lambda: len(bridge._members.present) == 1)
            again = (await three.join(num_groups=8)).groups
            assert [group.slot for group in again] == [3, 4, 5, 6, 11, 12, 13, 14]
            assert min(group.first_env_index for group in again) == 28

    play(test())


@pytest.mark.parametrize(
    ("num_actors", "num_groups", "expected"),
    [(1, 4096, 1), (7, 0, 1), (64, 0, 4), (4096, 1, 16), (6, 4, 3), (4093, 2, 4093)],
)
def test_groups_are_of_equal_size(num_actors: int, num_groups: int, expected: int) -> None:
    """Whatever a host asks for, it gets groups of one size, of at most 256 environments."""

    hello = Hello(
        protocol=wire.PROTOCOL,
        incarnation=b"1234567890123456",
        name="h",
        inference="host",
        num_actors=num_actors,
        num_groups=num_groups,
        num_cores=2,
    )
    member = Members(CONFIG).join(hello, b"")
    assert member is not None
    assert [group.num_envs for group in member.groups] == [num_actors // expected] * expected


@pytest.mark.parametrize("inference", ["host", "learner"])
def test_a_lost_host_is_missed_within_ten_seconds_and_may_come_back(
    inference: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is reported, and gets its slots again; environments whose unroll was lost begin anew."""
    clock = Clock()

    async def test() -> None:
        async with scene("a", clock=clock) as (_, bridge, peer):
            before = await peer.join(inference=inference)
            clock.now_s += LOST_S
            bridge.look_round()
            assert bridge.progress() == {"peer": 0}
            clock.now_s += 10.0 - LOST_S - TICK_S
            bridge.look_round()
            assert bridge.progress() == {}
            assert "actor host peer is lost: silent for 9 s" in caplog.text
            await peer.say(Ping(0.0, 0.0, 0))
            assert await peer.hear() == Unknown()
            await peer.say(peer.hello(inference=inference))
            after = await peer.hear()
            assert isinstance(after, Welcome)
            assert [group.slot for group in after.groups] == [0, 1, 2, 3]
            assert (after.groups == before.groups) == (inference == "host")

    play(test())


def test_a_lost_hosts_slots_go_to_others() -> None:
    """Who comes back after that gets others, and is told of unrolls that were counted."""
    clock = Clock()

    async def test() -> None:
        async with scene("a", "b", clock=clock) as (run, bridge, one, two):
            await one.join()
            await one.send_unroll(1, 0)
            assert await one.hear() == Accepted(1, 0)
            clock.now_s += 10
            bridge.look_round()
            assert [group.slot for group in (await two.join()).groups] == [0, 1, 2, 3]
            await one.say(one.hello())
            after = await one.hear()
            assert isinstance(after, Welcome)
            assert [group.slot for group in after.groups] == [4, 5, 6, 7]
            assert after.received == 1
            assert len(run.unrolls) == 1

    play(test())


def test_hello_may_be_said_again() -> None:
    """A host that is here keeps its groups; a Hello overtaken by a later one changes nothing."""

    async def test() -> None:
        async with scene("a") as (run, _, peer):
            old = peer.socket
            first = await peer.join()
            new = peer.connect()
            assert (await peer.join()).groups == first.groups
            await peer.send_unroll(1, 0)
            assert await peer.hear() == Accepted(1, 0)
            peer.socket = old
            await peer.say(peer.hello())
            await peer.say(Ping(1.0, 0.0, 0))
            assert await peer.hear(old) == Unknown()  # and no Welcome before it
            peer.socket = new
            await peer.say(peer.hello())
            again = await peer.hear()
            assert isinstance(again, Welcome)
            assert (again.groups, again.received) == (first.groups, 1)
            assert len(run.unrolls) == 1

    play(test())


def test_a_hello_of_before_a_loss_changes_nothing() -> None:
    """Who is back on its newest connection stays there, whatever an older one still says."""
    clock = Clock()

    async def test() -> None:
        async with scene("a", clock=clock) as (_, bridge, peer):
            await peer.join()
            old, new = peer.socket, peer.connect()
            await peer.join()
            clock.now_s += 10
            bridge.look_round()
            assert bridge.progress() == {}
            await peer.join()
            peer.socket = old
            await peer.say(peer.hello())
            await peer.say(Ping(1.0, 0.0, 0))
            assert await peer.hear() == Unknown()  # and no Welcome before it
            peer.socket = new
            await peer.say(Ping(2.0, 0.0, 0))
            assert isinstance(await peer.hear(), Pong)

    play(test())


def test_a_connection_is_one_hosts() -> None:
    """Who says Hello under another name leaves what it had before."""

    async def test() -> None:
        async with scene("a") as (_, bridge, peer):
            await peer.join(name="before")
            peer.incarnation = bytes(16)
            welcome = await peer.join(name="after")
            assert [group.slot for group in welcome.groups] == [0, 1, 2, 3]
            assert bridge.progress() == {"after": 0}
            await peer.send_unroll(1, 0)
            assert await peer.hear() == Accepted(1, 0)

    play(test())


def test_who_does_not_fit_is_refused() -> None:
    """Another protocol; an incarnation that is elsewhere's, or changes its place of inference."""

    async def test() -> None:
        async with scene("a") as (_, bridge, peer):
            await peer.say(peer.hello(protocol=wire.PROTOCOL + 1))
            refused = await peer.hear()
            assert isinstance(refused, Refused) and refused.for_good
            assert "update asyncagent" in refused.reason
            await peer.join()
            await peer.say(peer.hello(inference="learner"))
            assert isinstance(await peer.hear(), Refused)
            assert bridge.refused == 2

    play(test())


# What is counted.


def test_an_unroll_is_counted_once() -> None:
    """Repeats are acknowledged and not counted; gaps, other slots and other groups' are ignored."""

    async def test() -> None:
        async with scene("a") as (run, bridge, peer):
            await peer.join()
            await peer.send_unroll(1, 0)
            assert await peer.hear() == Accepted(1, 0)
            await peer.send_unroll(1, 0)
            assert await peer.hear() == Accepted(1, 0)
            await peer.send_unroll(3, 0)
            await peer.send_unroll(2, 9)
            await peer.send_unroll(2, 1)
            assert await peer.hear() == Accepted(2, 0)
            assert [unroll.observation[0, 0, 0] for unroll in run.unrolls] == [1, 2]
            assert run.told == [10, 10]
            assert bridge.rejected == 2

    play(test())


def test_a_bad_unroll_does_not_hold_up_the_next() -> None:
    """One that does not fit the spec is taken, told of, and not counted."""

    async def test() -> None:
        async with scene("a") as (run, bridge, peer):
            await peer.join()
            await peer.send_unroll(1, 0, num_envs=3)
            assert await peer.hear() == Accepted(1, 0)
            await peer.send_unroll(2, 0)
            assert await peer.hear() == Accepted(2, 0)
            assert (bridge.rejected, len(run.unrolls)) == (1, 1)

    play(test())


def test_a_host_cannot_claim_more_frames_than_an_unroll_has() -> None:
    """One row more than that of every environment is one too many."""
    most = (T + 1) * 2 * CONFIG.num_action_repeats

    async def test() -> None:
        async with scene("a") as (run, bridge, peer):
            await peer.join()
            for seq, frames in enumerate((most, most + 1), 1):
                await peer.send_unroll(seq, 0, frames=frames)
                assert await peer.hear() == Accepted(seq, 0)
            assert (bridge.rejected, run.told) == (1, [most])

    play(test())


def test_a_host_whose_row_cannot_be_is_told_so() -> None:
    """It would wait for an action that never comes."""

    async def test() -> None:
        async with scene("a") as (_, bridge, peer):
            welcome = await peer.join(inference="learner")
            format_ = RowFormat(SPEC, 2)
            blank = await CounterGroup([[7]] * 2).reset()
            for reward, answer in ((np.nan, Refused), (0.0, Act)):
                row = blank._replace(reward=np.full(2, reward, np.float32), first=np.ones(2, bool))
                header = RowSent(welcome.groups[0].slot, 0, "none", [], [])
                await peer.say(header, *format_.encode(row, None, "none"))
                heard = await peer.hear()
                assert isinstance(heard, answer), heard
                if isinstance(heard, Refused):
                    assert heard.for_good and "reward is not finite" in heard.reason
            assert bridge.rejected == 1

    play(test())


def test_more_than_the_credits_is_not_taken() -> None:
    """Beyond one unroll for each group nothing is kept for a host."""

    async def test() -> None:
        async with scene("a") as (run, bridge, peer):
            await peer.join()
            run.takes.clear()
            for seq in range(1, 8):
                await peer.send_unroll(seq, 0)
            await until(lambda: bridge.rejected == 3)
            assert bridge.progress() == {"peer": 4}
            run.takes.set()
            await until(lambda: len(run.unrolls) == 4)

    play(test())


def test_a_lost_hosts_unrolls_wait_for_it() -> None:
    """What had not been taken when it was lost is asked for again, and what had is not."""
    clock = Clock()

    async def test() -> None:
        async with scene("a", clock=clock) as (run, bridge, peer):
            welcome = await peer.join()
            await peer.send_unroll(1, 0)
            assert await peer.hear() == Accepted(1, 0)
            run.takes.clear()
            await peer.send_unroll(2, 1)
            await until(lambda: bridge.progress() == {"peer": 2})
            clock.now_s += 10
            bridge.look_round()
            run.takes.set()
            await peer.say(peer.hello())
            after = await peer.hear()
            assert isinstance(after, Welcome)
            assert (after.session, after.groups, after.received) == (
                welcome.session,
                welcome.groups,
                1,
            )
            await peer.send_unroll(2, 1)
            assert await peer.hear() == Accepted(2, 0)
            assert [unroll.observation[0, 0, 0] for unroll in run.unrolls] == [1, 2]

    play(test())


def test_slow_learner_stops_its_hosts(environments: Environments) -> None:
    """With a full queue a host has an unroll of each group on its way, one waiting, and rests."""

    async def test() -> None:
        async with scene() as (run, bridge):
            run.takes.clear()
            async with host_of(bridge.endpoint, num_actors=8, num_groups=4, name="h"):
                await until(lambda: environments.steps() == [2 * T] * 4)
                # Five more rounds of pings do not move it.
                member = bridge._members.present.popitem()[1]
                bridge._members.present[member.hello.incarnation] = member
                heard_s = member.heard_s
                await until(lambda: member.heard_s > heard_s + 0.5)
                assert environments.steps() == [2 * T] * 4
                assert bridge.progress() == {"h": 4}
                run.takes.set()
                await until(lambda: len(run.unrolls) > 40)
                assert run.is_whole()

    play(test())


@pytest.mark.parametrize("inference", ["host", "learner"])
def test_once_each_through_resets(environments: Environments, inference: str) -> None:
    """Connections that break in the middle of messages neither lose an unroll nor double one."""

    async def test() -> None:
        async with scene() as (run, bridge):
            port = int(bridge.endpoint.rpartition(":")[2])
            weather = Weather(reset_bytes=150_000, seed=3)  # the weights are 69,000
            async with Relay(("127.0.0.1", port), weather).running() as relay:
                there = f"tcp://127.0.0.1:{relay.port}"
                flags: dict[str, Any] = {"num_actors": 32, "num_groups": 4}
                async with host_of(there, inference=inference, **flags):
                    await until(lambda: relay.resets >= 6)
                    seen = len(run.unrolls)
                    await until(lambda: len(run.unrolls) >= seen + 20)
            assert len(run.counters()) == 4
            assert run.is_whole()
            assert len(environments.groups) == 4
            if inference == "host":
                # Rows of each group: the first, and those that the unrolls taken are made of.
                rows = T * len(run.unrolls) + 4
                assert sum(run.told) == 8 * rows * CONFIG.num_action_repeats

    play(test())


@pytest.mark.parametrize("inference", ["host", "learner"])
def test_host_goes_on_with_a_restarted_learner(environments: Environments, inference: str) -> None:
    """A learner of another session gets other environments, and nothing that was acted before."""

    async def test() -> None:
        before, after = Run(CONFIG), Run(CONFIG)
        flags: dict[str, Any] = {"num_actors": 8, "num_groups": 2, "inference": inference}
        async with scene(run=before) as (_, first):
            after.config = dataclasses.replace(CONFIG, listen=first.endpoint)
            host = host_of(first.endpoint, **flags)
            await host.__aenter__()
            await until(lambda: len(before.unrolls) >= 10)
        counted = len(before.unrolls)
        async with scene(run=after):
            await until(lambda: len(after.unrolls) >= 10)
            await host.__aexit__(None, None, None)
        assert len(before.unrolls) == counted
        assert before.is_whole() and after.is_whole()
        assert len(environments.groups) == 4
        assert [group.closed for group in environments.groups] == [True] * 4

    play(test())


# Weights.


def test_a_version_is_sent_once_at_a_time() -> None:
    """A host gets weights if there are newer ones, and no others while they are on their way."""

    async def test() -> None:
        async with scene("a", clock=Clock()) as (run, _, peer):
            await peer.join()
            await peer.say(WantWeights(-1))
            assert await peer.hear() == WeightsSent(0, "float32")
            run.version = run.published = 1
            await peer.say(WantWeights(-1))  # the others are on the way
            await peer.say(WantWeights(1))  # there are none
            await peer.say(Ping(1.0, 0.0, 0))
            assert await peer.hear() == Pong(1.0, 0, 1)
            await peer.say(WantWeights(0))
            assert await peer.hear() == WeightsSent(1, "float32")

    play(test())


def test_host_waits_for_weights_that_are_not_too_old(environments: Environments) -> None:
    """Beyond max_policy_lag it acts on only with newer weights."""

    async def test() -> None:
        async with scene() as (run, bridge):
            async with host_of(bridge.endpoint, num_actors=8, num_groups=4):
                await until(lambda: len(run.unrolls) >= 8)
                run.version = 21  # and no weights that are newer than 0
                member = next(iter(bridge._members.present.values()))
                heard_s = member.heard_s
                await until(lambda: member.heard_s > heard_s + 0.5)
                steps, taken = environments.steps(), len(run.unrolls)
                await until(lambda: member.heard_s > heard_s + 1.0)
                assert (environments.steps(), len(run.unrolls)) == (steps, taken)
                run.published = 21
                await until(lambda: len(run.unrolls) >= taken + 8)
            last = run.unrolls[-1]
            assert last.policy_version.min() == 21
            assert run.is_whole()

    play(test())


# Leaving, and being refused.


def test_host_that_is_stopped_says_bye(
    environments: Environments, caplog: pytest.LogCaptureFixture
) -> None:
    """The learner knows at once, without waiting for its silence."""

    async def test() -> None:
        async with scene(clock=Clock()) as (run, bridge):
            async with host_of(bridge.endpoint, num_actors=8, name="h"):
                await until(lambda: run.unrolls)
            await until(lambda: not bridge.progress())
            assert "actor host h leaves" in caplog.text
            assert all(group.closed for group in environments.groups)

    play(test())


async def status_of(capfd: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str]:
    """Exit status of ``asyncagent actors``, and the last line that it wrote."""
    status = await asyncio.to_thread(main, ["actors", "--num_actors=4", *flags])
    return status, capfd.readouterr().err.strip().splitlines()[-1]


def test_refused_host_ends_with_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    """Status 2 and the learner's reason, where asking again would not help."""

    async def test() -> None:
        with zmq.asyncio.Context() as context, context.socket(zmq.ROUTER) as learner:
            port = learner.bind_to_random_port("tcp://127.0.0.1")
            told = asyncio.create_task(status_of(capfd, f"--connect=tcp://127.0.0.1:{port}"))
            routing, _ = await learner.recv_multipart()
            reason = wire.encode_header(Refused("protocol 1 here is 2: update asyncagent", True))
            await learner.send_multipart([routing, reason])
            assert await told == (
                2,
                "asyncagent actors: the learner refuses this host: protocol 1 here is 2: update "
                "asyncagent",
            )

    play(test())


def test_host_refuses_a_learner_of_another_language(capfd: pytest.CaptureFixture[str]) -> None:
    """Who answers what no learner says is left with status 2."""

    async def test() -> None:
        with zmq.asyncio.Context() as context, context.socket(zmq.ROUTER) as learner:
            port = learner.bind_to_random_port("tcp://127.0.0.1")
            told = asyncio.create_task(status_of(capfd, f"--connect=tcp://127.0.0.1:{port}"))
            routing, _ = await learner.recv_multipart()
            await learner.send_multipart([routing, b"HTTP/1.1 400 Bad Request"])
            status, line = await told
            assert status == 2
            assert re.fullmatch(
                r"asyncagent actors: tcp://127.0.0.1:\d+ does not speak our language \(.*\): the "
                "same version of asyncagent must run on both sides",
                line,
            )

    play(test())


def test_host_with_another_spec_or_net_ends_with_one_line(
    environments: Environments, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Environments or weights that are not the learner's: status 2, and what differs."""

    async def test() -> None:
        run = Run(CONFIG)
        run.num_weights += 1
        async with scene(run=run) as (_, bridge):
            connect = f"--connect={bridge.endpoint}"
            status, line = await status_of(capfd, connect)
            assert status == 2
            assert re.match(r"asyncagent actors: net mlp has [\d,]+ weights here and [\d,]+", line)
            other = dataclasses.replace(SPEC, observation=ArraySpec((2,), "float32"))
            monkeypatch.setattr("asyncagent.host.usable_spec", lambda config: other)
            status, line = await status_of(capfd, connect)
            assert status == 2
            assert line.startswith("asyncagent actors: catch differs here from the learner's (")
            await until(lambda: not bridge.progress())

    play(test())


def test_learner_that_stays_away_is_given_up(
    capfd: pytest.CaptureFixture[str], unused_port: int
) -> None:
    """With give_up_s a host ends with status 1 instead of waiting for ever."""

    async def test() -> None:
        connect = f"--connect=tcp://127.0.0.1:{unused_port}"
        status, line = await status_of(capfd, connect, "--give_up_s=0.2")
        assert status == 1
        assert re.fullmatch(r"asyncagent actors: tcp://\S+: no learner for \d+ s", line)

    play(test())


@pytest.fixture
def unused_port() -> int:
    """Where nobody listens."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        return int(socket.bind_to_random_port("tcp://127.0.0.1"))


# Keys.


def keyed(folder: Path) -> tuple[Listener, Callable[[str], Any]]:
    """A listener with keys, and the keys with which a host of that name connects."""
    make_keys(folder, "learner")
    allowed = folder / "allowed"
    allowed.mkdir()
    learner = load_public(folder / "learner.key")

    def keys(name: str) -> Any:
        public, secret = make_keys(folder, name)
        shutil.copy(public, allowed)
        return load_secret(secret), learner

    return (
        Listener(CONFIG.listen, load_secret(folder / "learner.key_secret"), AllowedKeys(allowed)),
        keys,
    )


def test_revoked_key_stops_counting_while_connected(tmp_path: Path) -> None:
    """Within one look round: what its owner sends is not counted any more, nor is it answered."""

    async def test() -> None:
        listener, keys = keyed(tmp_path)
        good, bad = keys("good"), keys("bad")
        assert listener.allowed is not None
        listener.allowed.refresh()
        run = Run(CONFIG)
        async with bridge_of(run, Clock(), listener) as bridge:
            one, two = Peer(bridge.endpoint, good), Peer(bridge.endpoint, bad)
            for peer in (one, two):
                await peer.join(name="one" if peer is one else "two")
                await peer.send_unroll(1, 0 if peer is one else 4)
                assert await peer.hear() == Accepted(1, 0)
            (tmp_path / "allowed" / "bad.key").unlink()
            bridge.look_round()
            assert bridge.progress() == {"one": 1}
            assert bridge.refused == 1
            assert await two.hear() == Refused("its key is no longer allowed", True)
            await two.send_unroll(2, 4)
            await two.say(two.hello())
            received = asyncio.create_task(two.hear())
            await one.send_unroll(2, 0)
            assert await one.hear() == Accepted(2, 0)
            await one.say(Ping(1.0, 0.0, 0))
            assert await one.hear() == Pong(1.0, 2, 0)
            assert not received.done()
            received.cancel()
            assert len(run.unrolls) == 3
            one.close()
            two.close()

    play(test())


def refused_are(bridge: RemoteBridge, count: int) -> bool:
    """Whether it has refused so many."""
    return bridge.refused == count


def test_strangers_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without a key, with another learner's, with one that no file allows: none gets in."""

    async def test() -> None:
        listener, keys = keyed(tmp_path)
        good, unknown = keys("good"), keys("unknown")
        (tmp_path / "allowed" / "unknown.key").unlink()
        assert listener.allowed is not None
        listener.allowed.refresh()
        run = Run(CONFIG)
        async with bridge_of(run, Clock(), listener) as bridge:
            mistaken = (good[0], unknown[0].public)
            for count, shown in enumerate((None, mistaken, unknown), 1):
                stranger = Peer(bridge.endpoint, shown, once=True)
                stranger.socket.send(b"")
                await until(functools.partial(refused_are, bridge, count))
                stranger.close()
            peer = Peer(bridge.endpoint, good)
            await peer.join()
            assert bridge.report()._replace(hosts={}) == HostsReport({}, 3, 0)
            peer.close()

    play(test())
    assert len([line for line in caplog.messages if line.startswith("refused an actor host")]) == 2


def test_incarnation_belongs_to_its_key(tmp_path: Path) -> None:
    """Another host, allowed as it is, cannot speak for one that is here."""

    async def test() -> None:
        listener, keys = keyed(tmp_path)
        first, second = keys("first"), keys("second")
        assert listener.allowed is not None
        listener.allowed.refresh()
        async with bridge_of(Run(CONFIG), Clock(), listener) as bridge:
            one, two = Peer(bridge.endpoint, first), Peer(bridge.endpoint, second)
            await one.join()
            two.incarnation = one.incarnation
            await two.say(two.hello())
            assert isinstance(await two.hear(), Refused)
            await one.send_unroll(1, 0)
            assert await one.hear() == Accepted(1, 0)
            one.close()
            two.close()

    play(test())


def test_bridge_says_where_it_cannot_listen() -> None:
    """An address that is taken is one line."""

    async def test() -> None:
        from asyncagent.errors import UsageError

        async with scene() as (run, bridge):
            with pytest.raises(UsageError, match="Address already in use"):
                RemoteBridge(
                    run.config, SPEC, Listener(bridge.endpoint, None, None), run.learning(), 7
                )

    play(test())


@pytest.mark.parametrize("inference", ["host", "learner"])
def test_a_host_whose_environments_hang_has_stalled(
    inference: wire.Inference, environments: Environments, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends, with the group's name, instead of standing by; while it waits for its learner it
    has not stalled."""

    async def test() -> None:
        async with scene(stall_timeout_s=1.0) as (_, bridge):
            host = ActorHost(HostFlags(connect=bridge.endpoint, num_actors=4, inference=inference))
            working = asyncio.create_task(host.run())
            await until(lambda: len(environments.steps()) > 1 and min(environments.steps()) > 20)
            stuck = environments.groups[1]
            monkeypatch.setattr(stuck, "step", lambda action: asyncio.Future())
            with pytest.raises(BaseExceptionGroup) as caught:
                async with asyncio.timeout(WATCHDOG_S):
                    await working
            (error,) = caught.value.exceptions
            assert isinstance(error, Stalled)
            assert re.match(r"group \d+ has not moved", str(error))

    play(test())


@pytest.mark.parametrize("inference", ["host", "learner"])
def test_completed_run_sends_its_hosts_home(
    inference: wire.Inference, environments: Environments
) -> None:
    """A host whose learner has learned all it wanted to ends by itself, in good order."""

    async def test() -> None:
        async with scene() as (_, bridge):
            host = ActorHost(HostFlags(connect=bridge.endpoint, num_actors=4, inference=inference))
            working = asyncio.create_task(host.run())
            await until(lambda: bridge.progress())
            bridge.farewell()
            async with asyncio.timeout(WATCHDOG_S):
                await working

    play(test())
