"""All that decides what is compiled: the digest of a build is this folder and `configs`."""
