"""One module a logger, registered under the module's name. A file here is all a logger takes, with its extra."""
