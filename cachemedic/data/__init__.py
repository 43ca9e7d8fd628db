"""Text, and the tasks that are made of it.

From the bottom up:

text           embedded text: documentation and generated reviews
external_text  WikiText-2, SST-2 and Wikipedia from a folder or by name
text_source    one interface to both
windows        windows of tokens from the documents of a text
task_data      the tensors of a task
tasks          perplexity, sentiment, needle and mood tasks
chats          conversations about a text that states a fact
"""
