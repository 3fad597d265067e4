"""Random numbers as a function of where they are used, so that resuming needs no replay."""

import hashlib

import torch


def seed_of(*key: int | str) -> int:
    """A 63-bit seed from any number of integers and names, e.g. (seed, "views", epoch, step); equal on all machines."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded with `seed_of(*key)`."""
    return torch.Generator().manual_seed(seed_of(*key))
