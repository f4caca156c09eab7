"""Programs that run in the environments of other projects, and the creation of these environments."""
