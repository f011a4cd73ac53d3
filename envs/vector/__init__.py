"""Many environments stepped together: in this process, in workers, and those of all stages."""
