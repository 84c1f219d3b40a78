"""From chunks of actions to one command per control step."""
