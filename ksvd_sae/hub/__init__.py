"""From a run or a dictionary to a repository on the Hugging Face Hub, and back into any process.

source.py says what is published, write.py puts it into a local folder with card.py's model card, upload.py brings that
folder to the Hub, load.py takes an SAE or a dictionary out of the folder or the repository. layout.py is what both ends
know of the folder.
"""
