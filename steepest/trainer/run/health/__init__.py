"""Health checks: what a curve would show an expert, as sentences. docs/health.md has the list."""
