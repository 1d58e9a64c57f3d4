"""Who explains a latent and predicts by the explanation, for the autointerp eval."""
