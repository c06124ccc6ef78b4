"""Peers, one file each. A new one is a file with these names, and its row in PEERS.

  NAME                 how the command line calls it
  add_arguments(p)     its flags
  versions(o)          {program: version}
  contests(o, redraft) Contests; raises Missing with what was expected and how to get it
"""


class Missing(Exception):
    """A peer is not there: what was expected, and how to get it."""


def table():
    from peers import llama, pytorch, reference, server

    return {peer.NAME: peer for peer in (pytorch, llama, reference, server)}
