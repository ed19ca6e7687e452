"""The methods side by side: small models, paired seeds, the same text in the same order."""
