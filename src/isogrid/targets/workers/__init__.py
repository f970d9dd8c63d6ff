"""What runs in the environments of runtimes; see `isogrid.targets.subprocesses`."""
