"""The configuration by subject: dataclass, meaning of null, rules, keys without effect and warnings of each."""
