"""Edit control: what keeps the clip where a sentence does not change it. Pure tensors; ``host.controlled`` runs it."""
