"""What runs inside another project's environment, and how that environment is made."""
