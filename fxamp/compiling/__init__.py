"""What torch.compile needs beside the pass."""

__all__: list[str] = []
