"""Names of a folder of torch.distributed.checkpoint (DCP), which are needed without its reader."""

CONTAINER = "torch DCP"
METADATA = ".metadata"
SUFFIX = ".distcp"
