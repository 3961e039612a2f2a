"""The teacher as an ``nn.Module``, and the way back to the student (CBR)."""
