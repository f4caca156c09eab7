"""`steepest doctor` reports what this machine, its devices and its packages can run, and a remedy for every problem.

The command does not load torch itself: another process (`probe`) asks the devices, so that a broken install becomes a
line of the report.
"""
