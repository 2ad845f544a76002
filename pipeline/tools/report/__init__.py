"""`overnight report`: one page of HTML, or one picture, that tells what happened in a run."""
