"""vLLM V1's scheduler with its OffloadingConnector: a tier of host memory that blocks are stored in and loaded from."""
