"""`steepest doctor`: what this machine, its devices and its packages are good for, and the remedy of what is wrong.

Nothing of it loads torch in its own process: a process of its own asks the devices (`probe`), so that a broken install
is a line of the report.
"""
