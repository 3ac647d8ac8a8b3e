"""The paper's user study as a tool: blind pairs, answers that no crash loses, and what they say."""
