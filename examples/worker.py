"""Offers this computer to the room until Ctrl-C: python examples/worker.py [NAME]"""

import sys

import swarm_os

swarm_os.SwarmWorker(sys.argv[1] if len(sys.argv) > 1 else None).serve_forever()
