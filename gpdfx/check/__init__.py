"""The check: is the teacher the student?"""
