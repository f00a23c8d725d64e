"""Proves that several nodes give the tokens and logits of one, bit for bit: python examples/verify.py [MODEL] [NODES]

Without NODES, over the workers that are found in the room; with it, over so many processes of this computer.
"""

import sys

import swarm_os

model = sys.argv[1] if len(sys.argv) > 1 else "smol"
nodes = int(sys.argv[2]) if len(sys.argv) > 2 else None

with swarm_os.SwarmMaster(model, split="always", nodes=nodes) as bot:
    receipt = bot.verify("Why is the sky blue?", max_tokens=32)
    print(f"model            {receipt['model']}")
    print(f"nodes            {', '.join(receipt['nodes'])}")
    print(f"tokens           {receipt['tokens']}")
    print(f"logits, one node {receipt['logits_hash_single']}")
    print(f"logits, ring     {receipt['logits_hash_ring']}")
    print(f"equal to one node: {'yes' if receipt['equal'] else 'no'}")
    sys.exit(0 if receipt["equal"] else 1)
