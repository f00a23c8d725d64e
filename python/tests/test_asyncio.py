"""The same for asyncio."""

from __future__ import annotations

import asyncio
import gc
import time

import pytest

import swarm_os

QUESTION = "What is the future of AMD Architecture?"


def alone(model):
    return swarm_os.AsyncSwarmMaster(model, discover=False, threads=1)


async def idle(bot):
    until = time.monotonic() + 5
    while bot.master.status()["sessions"]:
        assert time.monotonic() < until
        await asyncio.sleep(0.005)


def test_an_answer(toy):
    async def main():
        async with alone(toy) as bot:
            text = await bot.generate(QUESTION, max_tokens=20)
            pieces = [piece async for piece in bot.generate(QUESTION, max_tokens=20, stream=True)]
            assert "".join(pieces) == text and len(pieces) > 5
            many = await asyncio.gather(*(bot.generate(QUESTION, max_tokens=20) for _ in range(4)))
            assert many == [text] * 4 and bot.total_tokens == 120
            assert bot.stats()["completion_tokens"] == 20
            assert (await bot.logits([1, 2, 3])).shape == (3, 264)
            assert (await bot.plan())["sentence"]

    asyncio.run(main())


def test_the_loop_goes_on_meanwhile(slow):
    async def main():
        async with alone(slow) as bot:
            ticks = 0

            async def tick():
                nonlocal ticks
                while True:
                    ticks += 1
                    await asyncio.sleep(0.002)

            ticking = asyncio.create_task(tick())
            await bot.generate(QUESTION, max_tokens=40)
            ticking.cancel()
            assert ticks > 10

    asyncio.run(main())


@pytest.mark.parametrize("end", ["aclose", "with", "drop", "cancel"])
def test_an_answer_that_is_ended_early(slow, end):
    async def main():
        async with alone(slow) as bot:
            answer = bot.generate(QUESTION, max_tokens=1500, stream=True)
            if end == "cancel":
                task = asyncio.create_task(answer.read())
                while answer.answer is None:
                    await asyncio.sleep(0.01)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            elif end == "with":
                async with answer:
                    assert await anext(answer)
            else:
                assert await anext(answer)
                if end == "aclose":
                    await answer.aclose()
                    assert answer.answer.finish_reason == "cancelled"
            if end == "drop":
                del answer
                gc.collect()
            await idle(bot)
            assert await bot.generate("x", max_tokens=2)

    asyncio.run(main())


def test_errors_arrive(toy):
    async def main():
        async with alone(toy) as bot:
            with pytest.raises(ValueError, match="temperature"):
                await bot.generate("x", temperature=-1)
            with pytest.raises(TypeError, match="bogus"):
                async for _ in bot.generate("x", stream=True, bogus=1):
                    pass
        with pytest.raises(swarm_os.SwarmError, match="connect"):
            await bot.generate("x")

    asyncio.run(main())


def test_a_worker_that_is_killed(slow, worker):
    process, peer = worker("den", slow)

    async def main():
        bot = swarm_os.AsyncSwarmMaster(slow, peers=peer, discover=False, split="always", threads=1)
        async with bot:
            answer = bot.generate(QUESTION, max_tokens=1500, stream=True)
            assert await anext(answer)
            process.kill()
            with pytest.raises(swarm_os.NodeLostError):
                async for _ in answer:
                    pass

    asyncio.run(main())
