"""A closed small world with a known gold reward, to run the whole pipeline on in minutes."""
