"""Many processes: sequence parallelism, sharded weights, a shared autoencoder, and ranks that fail together.

Everything is put on from outside: the networks' parameterless seams (``scatter``, ``attend``, ``gather``) are replaced
and their blocks wrapped; no network knows of ranks. Imports ``vdot.models``, never the reverse.
"""
