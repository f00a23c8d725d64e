"""A conversation on this computer and the workers it finds: python examples/chat.py [MODEL]"""

import sys

import swarm_os

model = sys.argv[1] if len(sys.argv) > 1 else "smol"

with swarm_os.SwarmMaster(model) as bot:
    for node in bot.nodes():
        print("{name}: layers {layers[0]}..{layers[1]}".format(**node))
    chat = bot.chat(system="You are a helpful assistant. Answer in a few sentences.")
    while True:
        try:
            question = input("> ")
        except EOFError:
            break
        if question.strip() in ("", "exit"):
            break
        try:
            # Ctrl-C ends an answer and leaves the conversation as it was.
            for piece in chat.say(question, stream=True):
                print(piece, end="", flush=True)
            print()
        except KeyboardInterrupt:
            print("\nstopped")
        except swarm_os.NodeLostError as lost:
            print(f"\n{lost}")
