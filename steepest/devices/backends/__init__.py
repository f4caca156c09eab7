"""One module a device, each with a class of the module's name in the table. A file here is all a device takes."""
