"""Names of the files in a folder of torch.distributed.checkpoint (DCP)."""

METADATA = ".metadata"
SUFFIX = ".distcp"
