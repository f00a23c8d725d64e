"""A worker in a Python process is a node like any other."""

from __future__ import annotations

import json
import time

import pytest

import swarm_os


def test_it_serves_a_master_of_another_process(start, toy):
    events = []
    with swarm_os.SwarmWorker("den", local=True, model=toy, threads=1, on_event=events.append) as worker:
        peer = f"127.0.0.1:{worker.port}"
        args = ["run", "--json", "--peer", peer, "--split", "always", "--max-tokens", "5", "--model", toy, "x"]
        asked = start("swarm-os", *args)
        assert asked.wait() == 0, asked.lines
        assert any(node["name"].startswith("den-") for node in json.loads(asked.lines[-1])["nodes"])
        until = time.monotonic() + 20
        while not any(event["event"] == "left" for event in events) and time.monotonic() < until:
            time.sleep(0.02)
        status = worker.status()
        assert status["name"].startswith("den-") and status["port"] == worker.port
    kinds = [event["event"] for event in events]
    assert kinds[0] == "waiting" and {"joined", "running", "step", "left"} <= set(kinds)
    assert all("words" in event for event in events)
    assert not worker.is_running
    with pytest.raises(swarm_os.SwarmError, match=r"call start\(\) first"):
        worker.status()
    worker.stop()


def test_master_and_workers_in_one_process(toy):
    workers = [swarm_os.SwarmWorker(f"w{n}", local=True, model=toy, threads=1).start() for n in range(2)]
    peers = [f"127.0.0.1:{worker.port}" for worker in workers]
    with swarm_os.SwarmMaster(toy, peers=peers, discover=False, split="always", threads=1) as ring:
        assert len(ring.nodes()) == 3
        with swarm_os.SwarmMaster(toy, discover=False, threads=1) as one:
            assert ring.generate("hello", max_tokens=30) == one.generate("hello", max_tokens=30)
        served = [worker.status()["stage"]["layers"] for worker in workers]
        assert sorted(served) == sorted(node["layers"] for node in ring.nodes()[1:])
        # One that stops says goodbye, and the ring knows.
        workers[0].stop()
        with pytest.raises(swarm_os.SwarmError):
            for _ in range(1000):
                ring.generate("hello", max_tokens=30)
                if len(ring.nodes()) == 2:
                    raise swarm_os.SwarmError("it was placed anew")
    workers[1].stop()


def test_serve_forever_until_ctrl_c(start, toy):
    program = f"""
import swarm_os
worker = swarm_os.SwarmWorker("den", local=True, model={toy!r}, threads=1)
worker.serve_forever()
print("ended", worker.is_running)
"""
    process = start("python", "-c", program)
    process.expect("waits on port")
    process.interrupt()
    assert process.wait() == 0 and process.lines[-1] == "ended False"


def test_serve_forever_until_stop(start, toy):
    program = f"""
import swarm_os, threading
worker = swarm_os.SwarmWorker("den", local=True, model={toy!r}, threads=1)
threading.Timer(2, worker.stop).start()
worker.serve_forever()
print("ended")
"""
    process = start("python", "-c", program)
    assert process.wait() == 0 and process.lines[-1] == "ended"


def test_a_worker_that_nobody_stops_does_not_hold_the_process(start, toy):
    program = f"""
import swarm_os
worker = swarm_os.SwarmWorker("den", local=True, model={toy!r}, threads=1).start()
print("here")
"""
    process = start("python", "-c", program)
    assert process.wait() == 0 and process.lines == ["here"]


def test_a_port_that_is_taken(toy):
    with swarm_os.SwarmWorker("den", local=True, model=toy) as worker:
        with pytest.raises(swarm_os.SwarmError, match=str(worker.port)):
            swarm_os.SwarmWorker("other", local=True, model=toy, port=worker.port).start()
