"""One module for each data set that `steepest prepare` makes."""
