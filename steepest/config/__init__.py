"""Configuration: schema, loading, rules, derived values. No torch."""
