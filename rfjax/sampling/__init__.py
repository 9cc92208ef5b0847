"""From noise and a prompt to latents, and from latents to pixels."""
