"""What several test files share: tiny models, stand-ins, and machines that this one is not."""
