"""`steepest preflight`: a job looked at before it runs. docs/preflight.md says what it checks."""
