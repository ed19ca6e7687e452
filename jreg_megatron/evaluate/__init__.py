"""What a model can do, what its middle layers can do, and what two models differ in."""
