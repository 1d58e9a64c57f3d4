"""What others published: SAEs on the Hub, and scores of them by SAEBench."""
