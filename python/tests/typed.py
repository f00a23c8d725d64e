"""What a type checker has to accept; it is checked, not run."""

from __future__ import annotations

import swarm_os


def master() -> None:
    bot = swarm_os.SwarmMaster("smol", layers=[(0, 15), range(15, 30)], peers=["den:7000"], memory="8GB")
    with bot.connect(timeout=30) as same:
        text: str = same.generate("x", max_tokens=3, stop="y")
        stream: swarm_os.Generation = same.generate([{"role": "user", "content": "x"}], stream=True)
        for piece in stream:
            text += piece
        answer: str = same.chat(system="x").say("y")
        logits: memoryview[float] = same.logits([1, 2, 3])
        try:
            same.verify()
        except swarm_os.NodeLostError as error:
            layers: tuple[int, int] | None = error.layers
            print(layers, answer, logits.shape)


def worker() -> None:
    with swarm_os.SwarmWorker("den", port=0, on_event=print) as worker:
        port: int = worker.port
        print(port, worker.status())


async def later() -> None:
    async with swarm_os.AsyncSwarmMaster("smol", threads=2) as bot:
        text: str = await bot.generate("x")
        async for piece in bot.generate("x", stream=True):
            text += piece
