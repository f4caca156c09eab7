"""One module a rollout engine, registered under the module's name. A file here is all an engine takes."""
