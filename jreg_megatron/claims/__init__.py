"""The paper's six claims, judged on trained models by rules that were written before the training."""
