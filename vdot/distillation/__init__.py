"""The method: four-step generation learned by distribution matching, optimal transport and a discriminator.

``losses`` has the equations, ``rollout`` the generator's samples, ``steps`` who is sampled, scored and differentiated.
"""
