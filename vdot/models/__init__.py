"""Networks: torch, einops, and the library behind each wrapper. They know nothing of files, ranks, YAML or devices."""
